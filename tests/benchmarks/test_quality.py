"""The cells of the quality benchmark: equal but for the quantizer, each with a name of its own."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.__main__ import chosen_rates, data_configs
from benchmarks.quality.budgets import (
    BUDGETS,
    ablation_cells,
    comparison_cells,
    every_cell,
    rate_cells,
    run_config,
)
from benchmarks.quality.cells import ABLATIONS, FAIR, FAMILIES, METHODS, STOCHASTIC, Cell, Shape
from benchmarks.quality.decoders import decoder_table, run_tuning
from benchmarks.quality.peers import PeerQuantizer
from benchmarks.quality.report import PAGE, ablation_table, main_table, rate_table, rows_of
from benchmarks.quality.run_cell import run_cell
from benchmarks.quality.store import Store
from benchmarks.quality.variants import VariantQuantizer
from pipelines.config import DataConfig
from tokenizer import Tokenizer
from tokenizer.builders import rq_vae
from tokenizer.config import GroupConfig, NetworkConfig, StochasticQuantizerConfig

RATES = {(family, method.key): 4e-3 for family in FAMILIES for method in METHODS}


@pytest.mark.parametrize("name", BUDGETS)
def test_cells_of_a_place_have_equal_bits_networks_and_training(name: str, tmp_path: Path) -> None:
    budget = BUDGETS[name]
    data = DataConfig(image_size=32)
    by_place: dict[tuple[str, int], list[Any]] = {}
    for cell in comparison_cells(budget, RATES):
        own = data.model_copy(update={"image_size": 128 if cell.setting == "flowers" else 32})
        config = run_config(cell, budget, own, tmp_path)
        tokenizer = config.tokenizer.model_dump(exclude={"quantizer"})
        for group in tokenizer["groups"]:
            assert set(group["codebook_sizes"]) == {cell.shape.codebook_size}
            group.pop("shares_codebook")
        training = config.training.model_dump(exclude={"learning_rate"})
        by_place.setdefault((cell.place, cell.seed), []).append((tokenizer, training))
    for entries in by_place.values():
        assert all(entry == entries[0] for entry in entries)


@pytest.mark.parametrize("name", BUDGETS)
def test_each_cell_has_a_name_of_its_own_and_a_rate_that_is_chosen(name: str) -> None:
    budget = BUDGETS[name]
    compared, chosen = list(comparison_cells(budget, RATES)), list(rate_cells(budget))
    cells = [*compared, *ablation_cells(budget, RATES)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.name for cell in cells + chosen} <= {cell.name for cell in every_cell(budget)}
    assert {cell.rate_key for cell in compared} <= {cell.rate_key for cell in chosen}


def test_an_ablation_differs_from_the_default_in_what_it_names(tmp_path: Path) -> None:
    budget = BUDGETS["cpu"]
    data = DataConfig()
    shape = budget.ablation_shapes[0]
    default = run_config(Cell(shape, STOCHASTIC, 1e-3, 0), budget, data, tmp_path)
    for name, ablation in ABLATIONS.items():
        changed = run_config(Cell(shape, STOCHASTIC, 1e-3, 0, name), budget, data, tmp_path)
        pairs = (
            (changed.tokenizer.quantizer, default.tokenizer.quantizer, ablation.quantizer),
            (changed.recipe, default.recipe, ablation.recipe),
        )
        for own, other, named in pairs:
            usual = other.model_dump()
            assert {k: v for k, v in own.model_dump().items() if v != usual[k]} == dict(named)
        is_changed = ablation.variant, ablation.warms_up_latents, ablation.has_linear_temperature
        assert ablation.quantizer or ablation.recipe or any(is_changed)


def test_a_shape_tells_its_family_and_bits() -> None:
    assert Shape((8,), (1,), 256).family == "SQ-VAE"
    assert Shape((8,), (4,), 64).family == "RSQ-VAE"
    assert Shape((4, 8), (1, 1), 256).family == "SQ-VAE-2"
    assert Shape((4, 8), (2, 2), 16).family == "HQ-VAE"
    assert Shape((4, 8), (2, 2), 16).name == "4x4x2+8x8x2-k16"
    assert Shape((4, 8), (2, 2), 16).nominal_bits == Shape((4, 8), (1, 1), 256).nominal_bits == 640


@pytest.mark.parametrize("peer", ["ResidualVQ", "FSQ", "SimVQ", "LFQ"])
def test_a_peer_decodes_its_indices_to_what_it_gave(peer: Any) -> None:
    torch.manual_seed(0)
    depth = 3 if peer == "ResidualVQ" else 1
    group = GroupConfig(downsampling=4, codebook_sizes=(16,) * depth, code_dim=8)
    quantizer = PeerQuantizer(group, peer)
    latents = torch.randn(4, 8, 4, 4)
    quantizer.initialize(latents, torch.Generator())
    output = quantizer.eval()(latents, "nearest")
    assert output.indices.shape == (4, depth, 4, 4)
    decoded = sum(quantizer.codebook(n)[output.indices[:, n]] for n in range(depth))
    torch.testing.assert_close(decoded.movedim(-1, 1), output.quantized)
    quantizer.train()(latents.requires_grad_(), "mixture").quantized.sum().backward()
    assert latents.grad is not None


def variant(name: Any) -> VariantQuantizer:
    group = GroupConfig(downsampling=4, codebook_sizes=(16, 16), code_dim=8)
    torch.manual_seed(0)
    return VariantQuantizer(group, StochasticQuantizerConfig(), name).double()


def test_variants_differ_in_training_alone() -> None:
    latents = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    outputs = [variant(n)(latents, "nearest") for n in ("per-layer-terms", "expected-terms")]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_the_expected_term_is_the_mean_of_the_squared_distance() -> None:
    latents = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    group = GroupConfig(downsampling=4, codebook_sizes=(16,), code_dim=8)
    quantizer = VariantQuantizer(group, StochasticQuantizerConfig(), "expected-terms").double()
    error = quantizer(latents, "mixture", 1.0).latent_terms["quantization_error"]
    rows = latents.movedim(1, -1).reshape(2, 16, 1, 8)
    distances = (rows - quantizer.codebook(0)).square().sum(-1) / 2  # s² = 1; (B, positions, K)
    expected = ((-distances).softmax(-1) * distances).sum((1, 2))
    torch.testing.assert_close(error, expected)


def test_a_hard_phase_gives_the_nearest_codes_and_a_gradient() -> None:
    latents = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    quantizer = variant("hard-phase")
    quantizer.is_hard = True
    output = quantizer(latents, "mixture", 0.5)
    torch.testing.assert_close(output.quantized, quantizer(latents, "nearest").quantized)
    output.quantized.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


@pytest.mark.slow
def test_a_cell_is_trained_measured_and_reported(tmp_path: Path) -> None:
    budget = BUDGETS["tiny"]
    data = data_configs(None, None)["cifar10"].model_copy(
        update={"num_images": 64, "num_validation_images": 64, "cache_dir": tmp_path / "cache"}
    )
    shape = Shape((8,), (2,), 16)
    cells = [Cell(shape, method, 1e-3, 0) for method in (STOCHASTIC, FAIR)]
    cells.append(Cell(shape, STOCHASTIC, 1e-3, 0, "hard-phase"))
    for cell in cells:
        run_cell(cell, budget, data, tmp_path)
    for cell in cells[:2]:
        run_tuning(cell, budget, data, tmp_path, None)
    store = Store(tmp_path, tmp_path / "cells.json")
    assert all(store.has_result(cell.name) for cell in cells)
    assert [store.has_decoder(cell.name) for cell in cells] == [True, True, False]
    table = main_table(rows_of_lists := list(store.results.values()))
    assert len(rows_of(rows_of_lists)) == 2
    assert "RSQ-VAE" in table
    assert "RQ-VAE, fair" in table
    assert "hard-phase" in ablation_table(rows_of_lists)
    assert len(decoder_table(rows_of_lists).splitlines()) == 4
    again = Store(tmp_path / "elsewhere", tmp_path / "cells.json")
    assert again.results == store.results


def result(method: str, rate: float, seed: int, error: float, ablation: str = "") -> dict[str, Any]:
    return {
        "cell": f"{method}{rate}{seed}{ablation}",
        "shape": "8x8-k16",
        "family": "SQ-VAE",
        "method": method,
        "title": method,
        "ablation": ablation,
        "rate": rate,
        "seed": seed,
        "images_per_second": 100.0,
        "validation": {"RMSE": [[10, 20], [2 * error, error]]},
        "test": {
            "RMSE": error,
            "PSNR": 20.0,
            "SSIM": 0.5,
            "perplexity": [8.0],
            "codebook_usage": [1.0],
            "nominal_bits": 256.0,
            "marginal_bits": 200.0,
        },
    }


def test_the_table_shows_each_methods_best_rate_and_means_over_seeds() -> None:
    cells = [
        result("stochastic", 1e-3, 0, 0.08),
        result("stochastic", 2e-3, 0, 0.06),
        result("stochastic", 2e-3, 1, 0.08),
        result("nearest", 1e-3, 0, 0.09),
        result("stochastic", 2e-3, 0, 0.5, "hard-phase"),
    ]
    rows = rows_of(cells)
    assert {row.first["method"]: row.spread() for row in rows} == {
        "stochastic": "7.00 ± 1.00",
        "nearest": "9.00",
    }
    lines = main_table(cells).splitlines()
    ours = next(line for line in lines if "| stochastic |" in line)
    assert "**7.00 ± 1.00**" in ours
    assert "| 20 |" in ours  # the baseline's 9.00 is reached between steps 10 and 20
    assert "| 8.00 | 6.00 |" in rate_table(cells)


def test_the_rate_with_the_lowest_validation_error_is_chosen(tmp_path: Path) -> None:
    budget = BUDGETS["tiny"]
    results = [
        {"cell": cell.name, "validation": {"RMSE": [[1], [abs(cell.rate - 2e-3)]]}}
        for cell in rate_cells(budget)
    ]
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(results))
    assert set(chosen_rates(budget, Store(tmp_path, path)).values()) == {2e-3}


def test_a_tokenizer_takes_a_peer_in_place_of_its_quantizer() -> None:
    config = rq_vae(4, 2, 16, 8, networks=NetworkConfig(width=8, max_width=8, num_blocks=1))
    build = functools.partial(PeerQuantizer, peer="ResidualVQ")
    tokenizer = Tokenizer(config, quantizer=build)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    tokenizer.initialize_from_data(images, torch.Generator())
    tokenizer.train()(images).latent_terms["commitment"].backward()
    tokenizer.eval()
    torch.testing.assert_close(
        tokenizer.decode(tokenizer.encode(images)), tokenizer.reconstruct(images)
    )


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["quality", "ablations", "decoders", "rates"])
def test_the_page_has_a_place_for_each_table(name: str, budget: str) -> None:
    """A run of hours must not end at the writing of its report."""
    page = PAGE.read_text()
    assert page.count(f"<!-- {name}-{budget} -->") == page.count(f"<!-- /{name}-{budget} -->") == 1
