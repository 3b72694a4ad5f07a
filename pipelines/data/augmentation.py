"""Random crops and colors of a training image, as functions of (seed, step, item)."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

_LOG_RATIO = math.log(4 / 3)
"""Of the sides of a crop at most, as in "Going Deeper with Convolutions" (Szegedy et al., 2015)."""
_COLORS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class Draw(NamedTuple):
    """Seven numbers on [0, 1) that decide what is done with one image at one step."""

    area: float
    ratio: float
    left: float
    top: float
    colors: tuple[float, ...]
    """For brightness, contrast and saturation."""


def draw(seed: int, step: int, item: int) -> Draw:
    """The numbers of an item at a step; raw output, which numpy keeps the same in all versions."""
    key = np.random.SeedSequence(seed, spawn_key=(3, step, item))
    area, ratio, left, top, *colors = (np.random.Philox(key).random_raw(7) / 2**64).tolist()
    return Draw(area, ratio, left, top, tuple(colors))


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A part of an image, of `least_area` to all of it."""

    drawn: Draw
    least_area: float

    @property
    def _area(self) -> float:
        return self.least_area + (1 - self.least_area) * self.drawn.area

    @property
    def _ratio(self) -> float:
        """Width by height, before they are cut to those of the image."""
        return math.exp((2 * self.drawn.ratio - 1) * _LOG_RATIO)

    def __call__(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in an image of this size."""
        pixels = self._area * width * height
        kept_width = min(math.sqrt(pixels * self._ratio), width)
        kept_height = min(math.sqrt(pixels / self._ratio), height)
        left = self.drawn.left * (width - kept_width)
        top = self.drawn.top * (height - kept_height)
        return left, top, left + kept_width, top + kept_height

    @property
    def least_share(self) -> float:
        """Of the shorter side of any image, what the shorter side of the crop is at least."""
        return math.sqrt(self._area / max(self._ratio, 1 / self._ratio))


def jittered(
    pixels: UInt8[np.ndarray, "height width channels"], drawn: Draw, strength: float
) -> UInt8[np.ndarray, "height width channels"]:
    """Brightness, contrast and saturation times 1 - `strength` to 1 + `strength`; alpha stays."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    for kind, number in zip(_COLORS, drawn.colors, strict=True):
        image = kind(image).enhance(1 + (2 * number - 1) * strength)
    return np.asarray(image).reshape(pixels.shape)
