"""Pictures of codes: where they are chosen, what is drawn there, what they change."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pipelines.evaluation.code_statistics import EncodedImages, decode, encode
from pipelines.images import image_grid
from tokenizer import Tokenizer

NUM_EXAMPLES = 5
"""Image parts of each code."""
NUM_CONTEXTS = 16
"""Images in which a code is put in place of another."""
ROW_WIDTH = 700
"""Pixels on the page for the pictures of a code."""
SMALLEST_WINDOW = 12


def decoded_by_layer(
    tokenizer: Tokenizer, images: UInt8[Tensor, "batch channels height width"]
) -> tuple[list[UInt8[Tensor, "batch channels height width"]], list[str]]:
    """Reconstructions from the first layer, from the first two, and so on, and what they are."""
    indices = encode(tokenizer, images)
    numbers = range(1, len(tokenizer.codebook_sizes) + 1)
    labels = [f"layers 1–{number}" if number > 1 else "layer 1" for number in numbers]
    return [decode(tokenizer, indices, number) for number in numbers], labels


class LayerPictures(NamedTuple):
    """Of some codes of a layer, a row each."""

    grid: Image.Image
    """Image parts that chose the code, what is drawn there, and what the code changes."""
    cell: int
    """Side of the cell of a code in pixels."""
    window: int
    """Side of the parts in pixels, with the cell in their center."""
    largest_change: float
    """Of intensities on [0, 1]; shown as white or black."""


def layer_pictures(
    tokenizer: Tokenizer, encoded: EncodedImages, layer: int, codes: list[int]
) -> LayerPictures:
    """Pictures of `codes` of a layer, which counts from 0.

    Examples are of different images, chosen at random. Drawn is by this layer and those before it.
    What a code changes is the mean over images of the difference that it makes when it is put into
    the middle of their map, in place of the code there.
    """
    cell = encoded.images.shape[-1] // encoded.layers[layer].shape[-1]
    margin = cell * max(1, math.ceil((SMALLEST_WINDOW / cell - 1) / 2))
    height, width = encoded.layers[layer].shape[1:]
    changes = torch.stack([_mean_change(tokenizer, encoded, layer, code) for code in codes])
    changes = _window(changes, height // 2, width // 2, cell, margin)
    largest = changes.abs().max().item()
    shades = (127.5 + 127.5 * changes / max(largest, 1e-9)).round().to(torch.uint8)
    if shades.shape[1] in (2, 4):
        shades[:, -1] = 255  # of the alpha channel nothing could be seen
    rows = []
    for code, shade in zip(codes, shades, strict=True):
        items, *places = _examples(encoded.layers[layer], code, margin // cell)
        drawn = decode(tokenizer, [group[items] for group in encoded.indices], layer + 1)
        parts = []
        for images in (encoded.images[items], drawn):
            windows = [
                _window(image, int(y), int(x), cell, margin)
                for image, y, x in zip(images, *places, strict=True)
            ]
            blank = torch.full_like(shade, 255)
            parts += [*windows, *[blank] * (NUM_EXAMPLES + 1 - len(windows))]
        rows.append(torch.stack([*parts, shade]))
    window = shades.shape[-1]
    columns = len(rows[0])
    scale = max(1, ROW_WIDTH // (columns * (window + 2)))
    return LayerPictures(image_grid(torch.cat(rows), columns, scale), cell, window, largest / 2)


def _examples(indices: Tensor, code: int, margin: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, rows and columns of some places with this code, each in another image.

    Those that are `margin` cells from the border come first, as what is around them can be seen.
    """
    places = (indices == code).nonzero()
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
    distance = torch.minimum(places[:, 1:], torch.tensor(indices.shape[1:]) - 1 - places[:, 1:])
    is_inside = (distance >= margin).all(1)
    places = torch.cat([places[is_inside], places[~is_inside]])
    _, first = np.unique(places[:, 0].numpy(), return_index=True)
    items, rows, columns = places[np.sort(first)[:NUM_EXAMPLES]].unbind(1)
    return items, rows, columns


def _mean_change(
    tokenizer: Tokenizer, encoded: EncodedImages, layer: int, code: int
) -> Float[Tensor, "channels height width"]:
    """Of the values on [-1, 1] of reconstructions by all layers."""
    contexts = encoded.first(NUM_CONTEXTS)
    changed = EncodedImages(
        contexts.images, [group.clone() for group in contexts.indices], contexts.labels
    )
    own = changed.layers[layer]  # a view of the group's indices
    own[:, own.shape[1] // 2, own.shape[2] // 2] = code
    after, before = (tokenizer.decode(one.indices).float().cpu() for one in (changed, contexts))
    return (after - before).mean(0)


def _window(images: Tensor, row: int, column: int, cell: int, margin: int) -> Tensor:
    """A cell of a code map and what is around it; beyond the border white, or no change."""
    beyond = 255 if images.dtype == torch.uint8 else 0
    padded = torch.nn.functional.pad(images, [margin] * 4, value=beyond)
    side = cell + 2 * margin
    return padded[..., row * cell : row * cell + side, column * cell : column * cell + side]
