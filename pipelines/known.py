"""What is known of an image that is to be completed: pixels, code indices, windows."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from tokenizer.fields import check_whole
from tokenizer.storage.errors import InputError

UNKNOWN = -1
"""Stands for a code that is to be drawn."""


def fill_from_nearest(
    images: UInt8[Tensor, "batch channels height width"], is_unknown: Bool[Tensor, "height width"]
) -> UInt8[Tensor, "batch channels height width"]:
    """Unknown pixels become copies of the nearest known ones; black where none is known.

    So that codes near the border see nothing of what lay there before, nor an edge that is none.
    """
    if bool(is_unknown.all()):
        return torch.zeros_like(images)
    rows, columns = distance_transform_edt(
        is_unknown.numpy(), return_distances=False, return_indices=True
    )
    return images[:, :, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def known_codes(
    indices: Sequence[Int[Tensor, "batch _ _ _"]], is_unknown: Bool[Tensor, "height width"]
) -> list[Int[Tensor, "batch _ _ _"]]:
    """The codes of all layers under whose square of pixels none is unknown, -1 elsewhere."""
    pixels = is_unknown[None, None].float()
    known = []
    for group in indices:
        touched = nn.functional.adaptive_max_pool2d(pixels, (group.shape[2], group.shape[3])) > 0
        known.append(group.masked_fill(touched.to(group.device), UNKNOWN))
    return known


def first_layers(
    indices: Sequence[Int[Tensor, "batch _ _ _"]], keep_layers: int
) -> list[Int[Tensor, "batch _ _ _"]]:
    """The codes of so many layers, counted from the coarsest, -1 in the others.

    Raises:
        InputError: none or all would be kept.
    """
    num_layers = sum(group.shape[1] for group in indices)
    if not isinstance(keep_layers, int) or not 1 <= keep_layers < num_layers:
        raise InputError(
            f"keep_layers must be >= 1 and below the number of layers, {num_layers}, "
            f"got {keep_layers!r}"
        )
    known, left = [], keep_layers
    for group in indices:
        kept = group.clone()
        kept[:, max(left, 0) :] = UNKNOWN
        left -= group.shape[1]
        known.append(kept)
    return known


def seed_of(seed: Any, generator: torch.Generator | None) -> int:
    """The seed that is given, or one that is drawn from a generator.

    Raises:
        InputError: both are given, or it is no seed.
    """
    if generator is None:
        check_whole("seed", seed)
        return int(seed)
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, got {generator!r}")
    if seed != 0:
        raise InputError(f"seed must be left out beside generator, got {seed!r}")
    device = generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def seed_of_window(seed: int, number: int) -> int:
    """A seed of its own for each window of an image."""
    words = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


class Window(NamedTuple):
    """A part of a canvas, of the size of an image."""

    rows: slice
    columns: slice


def windows(
    canvas: tuple[int, int], picture: tuple[int, int], size: tuple[int, int]
) -> list[Window]:
    """Windows that cover a canvas, from the picture in it outwards, each half over the one before.

    Args:
        canvas: height and width.
        picture: top and left of the picture in it.
        size: height and width of the picture and of each window.
    """
    places = [
        [(abs(number), place) for number, place in _places(first, length, whole)]
        for first, length, whole in zip(picture, size, canvas, strict=True)
    ]
    # Nearest first: what a window sees has then been drawn on all sides that it can be.
    ordered = sorted(itertools.product(*places), key=lambda pair: pair[0][0] + pair[1][0])
    return [
        Window(slice(top, top + size[0]), slice(left, left + size[1]))
        for (_, top), (_, left) in ordered[1:]
    ]


def _places(first: int, length: int, whole: int) -> list[tuple[int, int]]:
    """Number of steps from the picture, and start, of the windows along one side."""
    stride, last = max(1, length // 2), whole - length
    after = [(n, min(first + n * stride, last)) for n in range(-(-(last - first) // stride) + 1)]
    before = [(-n, max(first - n * stride, 0)) for n in range(1, -(-first // stride) + 1)]
    return after + before
