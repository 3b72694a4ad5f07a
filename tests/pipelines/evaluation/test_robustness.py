"""Laws of changed images and of what becomes of their codes."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from pipelines.data.shapes import draw_shapes
from pipelines.evaluation.code_statistics import EncodedImages, encode
from pipelines.evaluation.robustness import blurred, measure_robustness, noisy, shifted
from pipelines.images import to_float
from tests.tokenizer.tiny import KINDS, make_tokenizer
from tokenizer import Tokenizer

NUM_IMAGES = 6


def shapes() -> Tensor:
    items = np.arange(NUM_IMAGES)
    return torch.from_numpy(draw_shapes(0, "train", items, 32, 3)).movedim(-1, 1).contiguous()


def spread_tokenizer(kind: str) -> Tokenizer:
    """Untrained, but started from images, if it can be: its codes tell them apart."""
    tokenizer = make_tokenizer(KINDS[kind]).float().eval()
    tokenizer.initialize_from_data(to_float(shapes()), torch.Generator().manual_seed(0))
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_no_change_keeps_every_code_and_others_do_not(kind: str) -> None:
    tokenizer = spread_tokenizer(kind)
    images = shapes()
    labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
    encoded = EncodedImages(images, encode(tokenizer, images), labels)
    unchanged, *others = measure_robustness(tokenizer, encoded)
    num_layers = len(tokenizer.codebook_sizes)
    assert unchanged.kept == [1.0] * num_layers
    assert (unchanged.input_rmse, unchanged.output_rmse) == (0, 0)
    assert all(len(row.kept) == num_layers for row in others)
    assert kind == "fsq" or min(min(row.kept) for row in others) < 1
    rows = {row.change: row for row in others}
    assert {f"shifted by {by} px" for by in (1, 2, 8)} < set(rows)
    assert all(row.input_rmse == 0 for name, row in rows.items() if "shift" in name)
    noises = [rows[f"noise, σ {by}"].input_rmse for by in (0.02, 0.05, 0.1)]
    assert noises == sorted(noises)


def test_plain_images_keep_every_code_under_blur() -> None:
    tokenizer = spread_tokenizer("stochastic")
    images = torch.arange(0, 240, 40, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)
    encoded = EncodedImages(images, encode(tokenizer, images), torch.zeros(6, dtype=torch.int64))
    for row in measure_robustness(tokenizer, encoded):
        assert (row.input_rmse == 0) == (not row.change.startswith("noise"))
        if row.change.startswith("blurred"):
            assert (row.kept, row.output_rmse) == ([1.0] * len(row.kept), 0)


def test_a_shift_moves_the_content_and_repeats_the_border() -> None:
    images = shapes()
    moved = shifted(images, 3)
    assert torch.equal(moved[..., 3:], images[..., :-3])
    assert torch.equal(moved[..., :3], images[..., :1].expand_as(moved[..., :3]))


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_a_blur_is_that_of_scipy(deviation: float) -> None:
    images = shapes()
    sigma = (0, 0, deviation, deviation)
    expected = scipy.ndimage.gaussian_filter(images.double().numpy(), sigma, mode="nearest")
    assert np.abs(blurred(images, deviation).numpy() - expected).max() < 0.51


def test_noise_has_its_deviation_and_is_the_same_again() -> None:
    images = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    changed = noisy(images, 0.05)
    assert torch.equal(changed, noisy(images, 0.05))
    assert (changed.double().std() / 255).item() == pytest.approx(0.05, rel=0.03)
