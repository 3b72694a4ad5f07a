"""Folders of shapes with captions, for `captions.py`: what is said of a shape, and of which."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.data.shapes import (
    CLASS_NAMES,
    ShapeFactors,
    draw_shapes,
    shape_factors,
    shape_labels,
)

SIZE = 32
COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")
MEAN_RADIUS = 0.615
"""Shapes below it are small."""
NEAR_CENTER = 0.26 / 3
"""Up to which distance a shape is neither left nor right."""


def attributes(shape: str, factors: ShapeFactors) -> dict[str, str]:
    """What is said of a shape, in words; a place is empty near the center."""

    def side(coordinate: float, names: tuple[str, str]) -> str:
        return "" if abs(coordinate) < NEAR_CENTER else names[coordinate > 0]

    return {
        "size": ("small", "large")[factors.radius >= MEAN_RADIUS],
        "color": COLORS[round(6 * factors.hue) % 6],
        "shape": shape,
        "horizontal": side(factors.x, ("left", "right")),
        "vertical": side(factors.y, ("above", "below")),
    }


def caption(words: Mapping[str, str]) -> str:
    """They as one text: "a small red star left above"."""
    return " ".join(["a", *filter(None, words.values())])


def describe(split: Literal["train", "validation"], number: int) -> list[dict[str, str]]:
    """Attributes of the first images of a split."""
    items = np.arange(number, dtype=np.int64)
    names = [CLASS_NAMES[label] for label in shape_labels(items)]
    return [
        attributes(name, factors)
        for name, factors in zip(names, shape_factors(0, split, items), strict=True)
    ]


def write_folder(
    root: Path, split: Literal["train", "validation"], number: int, size: int = SIZE
) -> None:
    """Images as PNG files, and metadata.csv with their captions and attributes."""
    root.mkdir(parents=True, exist_ok=True)
    images = draw_shapes(0, split, np.arange(number, dtype=np.int64), size, 3)
    described = describe(split, number)
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text", *described[0]])
        writer.writeheader()
        for item, (pixels, words) in enumerate(zip(images, described, strict=True)):
            Image.fromarray(pixels).save(root / f"{item:06d}.png")
            row = {"file_name": f"{item:06d}.png", "text": caption(words)}
            writer.writerow({**row, **words})
