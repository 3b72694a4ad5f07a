"""The procedural data set `shapes`: one colored shape on a muted, textured background."""

import colorsys
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray

Plane = NDArray[np.float64]

VERSION = 1
"""Raised whenever an image changes: drawn images are cached."""
NUM_DRAWS = 16
"""Random numbers reserved per image; a new factor of variation takes the next one."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luminance (ITU-R BT.601, as in Pillow)."""


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.85


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Plane, y: Plane) -> Plane:
    y = y - 0.2
    return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.55


def _star(x: Plane, y: Plane) -> Plane:
    """Five tips: the plane is folded onto half a tip, whose one edge is a straight line."""
    sector = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    distance = np.hypot(x, y)
    inner_x, inner_y = 0.45 * math.sin(sector), 0.45 * math.cos(sector)
    tip = 1.05
    length = math.hypot(inner_x, tip - inner_y)
    normal_x, normal_y = (tip - inner_y) / length, inner_x / length
    along_x, along_y = distance * np.sin(angle), distance * np.cos(angle)
    return normal_x * along_x + normal_y * (along_y - tip)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _cross(x: Plane, y: Plane) -> Plane:
    longer = np.maximum(np.abs(x), np.abs(y))
    shorter = np.minimum(np.abs(x), np.abs(y))
    return np.maximum(longer - 0.92, shorter - 0.29)


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.92, 0.72 - np.hypot(x - 0.45, y))


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner with a disc on each of the upper edges."""
    half_side = 0.56
    offset = half_side / math.sqrt(2)
    y = y + 0.08
    square = (np.abs(x) + np.abs(y)) / math.sqrt(2) - half_side
    discs = np.hypot(np.abs(x) - offset, y + offset) - half_side
    return np.minimum(square, discs)


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
}
"""Signed distance (negative inside) to each shape of radius about 1; y points down."""

CLASS_NAMES = tuple(SHAPES)


def _coverage(distance: Plane, pixel: float) -> Plane:
    """Share of a pixel that lies inside, which is what makes edges smooth."""
    return np.clip(0.5 - distance / pixel, 0, 1)


def _texture(kind: int, x: Plane, y: Plane, period: float, phase: float, pixel: float) -> Plane:
    """How far each pixel is from the first background tone to the second, in [0, 1]."""
    cell_x = (x / period + phase) % 1 - 0.5
    cell_y = (y / period + phase) % 1 - 0.5
    if kind == 0:
        return 0.5 + 0.35 * x  # gradient
    if kind == 1:
        return _coverage(period * np.hypot(cell_x, cell_y) - 0.3 * period, pixel)  # dots
    stripes = _coverage(period * (np.abs(cell_x) - 0.25), pixel)
    if kind == 2:
        return stripes
    crossing = _coverage(period * (np.abs(cell_y) - 0.25), pixel)
    return stripes + crossing - 2 * stripes * crossing  # checks


class _Draws:
    """The random numbers of one image, one after the other.

    They are made from the raw output of a counter-based generator, which numpy keeps the same
    in all versions.
    """

    def __init__(self, seed: int, split: Literal["train", "validation"], item: int) -> None:
        key = np.random.SeedSequence(seed, spawn_key=(("train", "validation").index(split),))
        generator = np.random.Philox(key=key.generate_state(2, np.uint64), counter=[0, item, 0, 0])
        raw = generator.random_raw(NUM_DRAWS) >> np.uint64(11)
        uniforms: list[float] = (raw * 2.0**-53).tolist()
        self._uniforms = iter(uniforms)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * next(self._uniforms)


class ShapeFactors(NamedTuple):
    """What the shape of an image looks like; lengths in halves of the image's side."""

    radius: float
    """From 0.55 to 0.68."""
    turn: float
    """Radians clockwise, from -0.25 to 0.25."""
    x: float
    """Of the center, from -0.26 (left) to 0.26."""
    y: float
    """Of the center, from -0.26 (above) to 0.26."""
    hue: float
    """Of the fill, from 0 (red) over 1/3 (green) and 2/3 (blue) to 1."""


def _draw_factors(draws: _Draws) -> ShapeFactors:
    """The first numbers of an image."""
    between = draws.between
    radius, turn = between(0.55, 0.68), between(-0.25, 0.25)
    x, y = between(-0.26, 0.26), between(-0.26, 0.26)
    return ShapeFactors(radius, turn, x, y, between(0.0, 1.0))


def shape_factors(
    seed: int, split: Literal["train", "validation"], items: Int64[np.ndarray, " items"]
) -> list[ShapeFactors]:
    """What the shapes of some images look like; their classes are `shape_labels`."""
    return [_draw_factors(_Draws(seed, split, item)) for item in items.tolist()]


def _draw_shape(
    label: int, draws: _Draws, image_size: int
) -> tuple[Float[np.ndarray, "size size 3"], Float[np.ndarray, "size size"]]:
    """Colors and coverage of the shape, both in [0, 1]."""
    between = draws.between
    pixel = 2 / image_size
    centers = (np.arange(image_size) + 0.5) * pixel - 1
    x, y = centers[None, :], centers[:, None]

    factors = _draw_factors(draws)
    left, top, radius = x - factors.x, y - factors.y, factors.radius
    sine, cosine = math.sin(factors.turn), math.cos(factors.turn)
    distance = SHAPES[CLASS_NAMES[label]](
        (cosine * left + sine * top) / radius, (cosine * top - sine * left) / radius
    )
    coverage = _coverage(radius * distance, pixel)

    color = (factors.hue, between(0.85, 1.0), between(0.85, 1.0))
    fill = np.array(colorsys.hsv_to_rgb(*color))
    # A dark background under bright fills and the other way round: visible in gray as well.
    tone = between(0.12, 0.3) if fill @ LUMINANCE > 0.5 else between(0.75, 0.9)
    hue, saturation, contrast = between(0.0, 1.0), between(0.05, 0.2), between(0.03, 0.06)
    first, second = (
        np.array(colorsys.hsv_to_rgb(hue, saturation, tone + sign * contrast)) for sign in (-1, 1)
    )
    kind, period, phase = int(between(0.0, 4.0)), between(0.5, 0.8), between(0.0, 1.0)
    direction = between(0.0, math.pi)
    sine, cosine = math.sin(direction), math.cos(direction)
    weight = _texture(kind, cosine * x + sine * y, cosine * y - sine * x, period, phase, pixel)
    background = first + weight[:, :, None] * (second - first)
    return background + coverage[:, :, None] * (fill - background), coverage


def shape_labels(items: Int64[np.ndarray, " items"]) -> Int64[np.ndarray, " items"]:
    """Class of each item: the classes take turns, so every run of 8 items has one of each."""
    return items % len(CLASS_NAMES)


def draw_shapes(
    seed: int,
    split: Literal["train", "validation"],
    items: Int64[np.ndarray, " items"],
    image_size: int,
    channels: Literal[1, 2, 3, 4],
) -> UInt8[np.ndarray, "items size size channels"]:
    """Images of the given items of an endless list, each a function of seed, split and item.

    The same item at another size is the same picture in another resolution. Channels: 1 is
    luminance, 3 is RGB; 2 and 4 add an alpha channel, the coverage of the shape.
    """
    images = np.empty((len(items), image_size, image_size, channels), np.uint8)
    for row, item in enumerate(items.tolist()):
        draws = _Draws(seed, split, item)
        colors, coverage = _draw_shape(item % len(CLASS_NAMES), draws, image_size)
        if channels <= 2:
            colors = (colors @ LUMINANCE)[:, :, None]
        if channels in (2, 4):
            colors = np.concatenate([colors, coverage[:, :, None]], axis=2)
        images[row] = np.rint(255 * colors)
    return images
