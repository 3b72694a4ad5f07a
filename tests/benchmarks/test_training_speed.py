"""The speed benchmarks of training: they run, and what they compute is right. Nothing is timed."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.speed import scaling, scaling_page, training
from benchmarks.speed.launches import sharded_losses
from benchmarks.speed.steps import prior_costs, tokenizer_costs
from pipelines.presets import TOKENIZER_PRESETS
from prior.config import PriorNetworkConfig
from tokenizer.config import CodeMapConfig


def test_an_exact_power_has_its_exponent() -> None:
    values = [2, 4, 16]
    seconds = [3 * value**1.5 for value in values]
    assert scaling.exponents(values, seconds) == pytest.approx((1.5, 1.5))


def test_flops_per_image_do_not_depend_on_the_batch() -> None:
    config = TOKENIZER_PRESETS["tiny"].tokenizer
    assert tokenizer_costs(config, 16, 2) == tokenizer_costs(config, 16, 4)


def test_flops_of_a_wide_prior_are_six_per_parameter_and_position() -> None:
    """Forward two and backward four per weight: the usual estimate."""
    network = PriorNetworkConfig(width=512, num_spatial_layers=8, num_depth_layers=1)
    maps = (CodeMapConfig(height=8, width=8, codebook_sizes=(16,), code_dim=8),)
    metadata = prior_costs(network, maps)
    assert metadata["flops_per_image"] == pytest.approx(6 * metadata["parameters"] * 64, rel=0.1)


def test_both_loops_are_probed() -> None:
    found = training.measurements("tiny")
    assert found.keys() == {"stage one", "stage two"}
    assert all(len(own["shares_of_stretches"]) == 1 for own in found.values())


@pytest.mark.slow
def test_the_page_is_written_from_the_results_alone(tmp_path: Path) -> None:
    found = scaling.measurements("tiny")
    machine = {"gpu": None}
    results = tmp_path / "scaling_tiny.json"
    results.write_text(json.dumps({**found, "command": "none", "machine": machine}))
    page = shutil.copy(scaling_page.PAGE, tmp_path / "scaling.md")
    scaling_page.write_page(results, Path(page))
    text = Path(page).read_text()
    assert "`images256-hqvae`" in text
    for name, curve in found["curves"].items():
        assert curve["title"] in text
        scaling.plot_curve(curve, tmp_path / f"{name}.png")


@pytest.mark.slow
def test_a_sharded_prior_has_the_losses_of_one_process() -> None:
    found = sharded_losses()
    one, two = found["runs"].values()
    assert found["largest_difference"] < 1e-5
    assert two["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-4)
    assert two["parameters_held_by_this_process"] < 0.51 * two["parameters"]
