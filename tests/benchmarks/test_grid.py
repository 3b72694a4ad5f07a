"""The measure of a grid against its definition and against grids that were drawn."""

import cmath
import itertools
import math

import pytest
import torch

from benchmarks.quality.grid import grid_energy


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.rand(64, 3, 32, 24, generator=torch.Generator().manual_seed(0))


def test_it_is_the_power_at_the_period_over_that_around(noise: torch.Tensor) -> None:
    squares = noise[:3, :1, :8, :8]
    images = torch.cat([squares, squares.mT])  # both axes alike
    at_peaks = around = 0.0
    for row in images.double().flatten(0, 2).tolist():
        steps = [abs(right - left) for left, right in itertools.pairwise(row)]
        steps = [0.0, *(step - sum(steps) / 7 for step in steps)]
        power = [
            abs(sum(step * cmath.rect(1, -math.tau * k * n / 8) for n, step in enumerate(steps)))
            for k in range(8)
        ]
        for k in (2, 4):  # a period of 4 in 8 pixels, and its harmonic
            at_peaks += power[k] ** 2
            around += sum(power[k + offset] ** 2 for offset in (-2, -1, 1, 2)) / 4
    assert grid_energy(images, 4) == pytest.approx(at_peaks / around)


def test_noise_has_no_grid_and_patches_have_that_of_their_side(noise: torch.Tensor) -> None:
    assert grid_energy(noise, 4) == pytest.approx(1, abs=0.1)
    patches = noise[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3)
    energies = [grid_energy(noise + weight * patches, 4) for weight in (0, 0.5, 1)]
    assert energies == sorted(energies)
    assert energies[-1] > 1.5
    assert grid_energy(7 * (noise + patches).mT, 4) == pytest.approx(energies[-1])
    assert grid_energy(noise + patches, 6) == pytest.approx(1, abs=0.2)
