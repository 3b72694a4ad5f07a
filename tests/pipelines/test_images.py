"""Laws of images for people: values are kept, places are known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.images import MODES, comparison, image_grid


def noise(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator).to(torch.uint8)


@given(
    count=st.integers(2, 7),
    columns=st.integers(1, 4),
    channels=st.sampled_from(sorted(MODES)),
    scale=st.integers(1, 3),
)
def test_a_grid_holds_image_i_in_row_i_over_columns(
    count: int, columns: int, channels: int, scale: int
) -> None:
    images = noise(count, channels, 3)
    used = min(columns, count)
    expected = np.full((-(-count // used) * 5 + 2, used * 5 + 2, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = 2 + number // used * 5, 2 + number % used * 5
        expected[top : top + 3, left : left + 3] = image.movedim(0, -1).numpy()
    expected = expected.repeat(scale, 0).repeat(scale, 1)
    grid = np.asarray(image_grid(images, columns, scale))
    assert np.array_equal(grid.reshape(expected.shape), expected)


@pytest.mark.parametrize(("size", "factor"), [(16, 4), (32, 2), (64, 1), (128, 1)])
def test_small_images_are_enlarged_to_64_pixels(size: int, factor: int) -> None:
    assert image_grid(noise(2, 3, size), 2).size == (factor * (2 * size + 6), factor * (size + 4))


def test_a_comparison_alternates_originals_and_reconstructions() -> None:
    originals, reconstructions = noise(3, 3, 4, 1), noise(3, 3, 4, 2)
    mixed = [image for pair in zip(originals, reconstructions, strict=True) for image in pair]
    assert comparison(originals, reconstructions) == image_grid(torch.stack(mixed), 8)
