"""The benchmark of losses: its cells, its measure of the grid, and one run of it."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from benchmarks.sharp.cells import BUDGETS, Cell, Weights, cells_of, run_config
from benchmarks.sharp.grid import grid_energy
from benchmarks.sharp.report import table, write_report
from benchmarks.sharp.run_cell import run_cell
from pipelines.config import DataConfig


def test_a_network_never_judges_what_it_has_taught_and_each_row_has_a_judge() -> None:
    for cell in cells_of("cifar10"):
        assert cell.judges
        if cell.losses in ("perceptual", "both"):
            assert cell.teacher not in cell.judges
    names = [cell.name for cell in cells_of("cifar10")]
    assert len(set(names)) == len(names)


def test_cells_differ_in_quantizer_and_losses_alone(tmp_path: Path) -> None:
    weights = Weights(tmp_path / "mobilenet", tmp_path / "squeezenet")
    configs = [
        run_config(cell, BUDGETS["cpu"], DataConfig(), weights, tmp_path)
        for cell in cells_of("cifar10")
        if cell.length == 1
    ]
    for config in configs:
        assert config.training == configs[0].training
        assert config.tokenizer.networks == configs[0].tokenizer.networks
        assert config.tokenizer.groups == configs[0].tokenizer.groups


@pytest.mark.parametrize("patch_size", [2, 4])
def test_the_grid_is_seen_and_smooth_noise_has_none(patch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(100, 156, (8, 3, 32, 32), generator=generator)
    plain = grid_energy(noise.to(torch.uint8), patch_size)
    assert plain == pytest.approx(1, abs=0.15)
    noise[..., ::patch_size, :] += 20
    assert grid_energy(noise.to(torch.uint8), patch_size) > 1.5 * plain


@pytest.mark.slow
def test_cells_are_trained_tuned_measured_and_reported(tmp_path: Path) -> None:
    budget = BUDGETS["tiny"]
    networks = {
        "mobilenet": timm.create_model("mobilenetv2_100", pad_type="same"),
        "squeezenet": torchvision.models.squeezenet1_0(),
    }
    for name, network in networks.items():
        save_file(network.state_dict(), tmp_path / name)
    weights = Weights(*(tmp_path / name for name in networks))
    data = DataConfig(num_images=64, num_validation_images=16, cache_dir=tmp_path / "cache")
    base, tuned = Cell("cifar10", True, "squared"), Cell("cifar10", True, "both", True)
    for cell in (base, tuned):
        run_cell(cell, budget, data, weights, tmp_path)
    write_report(tmp_path, tmp_path, "tiny", [base, tuned])
    rows = json.loads((tmp_path / "sharp_tiny.json").read_text())
    assert [row["cell"] for row in rows] == [tuned.name, base.name]
    assert rows[0]["loss_networks"][0].startswith("squeezenet1_0 ")
    assert "rFD-SqueezeNet" not in rows[0]["numbers"]
    assert rows[0]["numbers"]["perplexity"] == rows[1]["numbers"]["perplexity"]
    lines = table(rows).splitlines()
    assert "taught it" in lines[2]
    assert "(×" in lines[2]
    assert (tmp_path / "sharp_tiny_cifar10.jpg").exists()
