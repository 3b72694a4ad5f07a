"""Images of more than 8 bits per channel, which Pillow clips or cuts, reduced to 8 by rounding."""

import functools
import io
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.ImageFile import ImageFile

_PIXELS_AT_ONCE = 2**20
_FULL = 2**16 - 1


class ValueRange(NamedTuple):
    """What an image makes of its more than 8 bits per channel."""

    white: int
    """The value that becomes 255."""
    highest: int
    levels: int
    """The byte values used, one bit each."""

    def describe(self) -> str:
        """In words: "13 of 256 levels, values up to 3,391"."""
        clipped = f" of which those above {self.white:,} are clipped"
        return (
            f"{self.levels.bit_count()} of 256 levels, values up to {self.highest:,}"
            f"{clipped if self.highest > self.white else ''}"
        )

    def joined(self, other: "ValueRange | None") -> "ValueRange":
        """That of two images together."""
        if other is None:
            return self
        return ValueRange(
            max(self.white, other.white),
            max(self.highest, other.highest),
            self.levels | other.levels,
        )

    @property
    def is_suspicious(self) -> bool:
        """Whether half of the levels or more lie idle, or values are clipped."""
        return self.highest <= self.white // 2 or self.highest > self.white


class ValueRanges:
    """Those of many files: one of full range does not hide the others."""

    def __init__(self) -> None:
        self.num_files = self.num_suspicious = 0
        self._all: ValueRange | None = None
        self._suspicious: ValueRange | None = None

    def add(self, values: ValueRange | None) -> None:
        """Counts a file; None is one of 8 bits."""
        if values is None:
            return
        self.num_files += 1
        self._all = values.joined(self._all)
        if values.is_suspicious:
            self.num_suspicious += 1
            self._suspicious = values.joined(self._suspicious)

    def describe(self) -> str:
        """What the suspicious files use, or all where none is, and what to do about it."""
        values = self._suspicious or self._all
        assert values is not None
        count = f"{self.num_suspicious or self.num_files} of {self.num_files}"
        return (
            f"{count} images of more than 8 bits per channel use {values.describe()}; "
            f"data.white_value, now {values.white:,}, is the value that becomes white"
        )


def bits_per_channel(image: Image.Image, content: bytes) -> int:
    """By the header: Pillow drops the lower bits of colors as it reads."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    return 8


def reduce_to_eight_bits(
    image: Image.Image, content: bytes, white_value: int | None
) -> tuple[Image.Image, ValueRange]:
    """The same image in 8 bits, with transparency by color as an alpha channel.

    Args:
        image: loaded, of more than 8 bits per channel.
        content: of its file.
        white_value: the value that becomes 255; None takes the highest that its bits can hold.

    Raises:
        ValueError: it has no common white (floating point, signed or 32 bits), or a layout that
            Pillow cannot give in full.
    """
    white = white_value or 2 ** bits_per_channel(image, content) - 1
    read_rows, mode = _reader(image, content)
    bands = Image.getmodebands(mode)
    num_colors = bands - (mode in {"LA", "RGBA"})
    key = image.info.get("transparency")
    has_key = key is not None and bands == num_colors
    alpha_mode = {"L": "LA", "RGB": "RGBA"}.get(mode, mode) if has_key else mode
    pixels = np.empty((image.height, image.width, bands + has_key), np.uint8)
    highest, counts = 0, np.zeros(256, np.int64)
    rows_at_once = max(1, _PIXELS_AT_ONCE // image.width)
    for start in range(0, image.height, rows_at_once):
        rows = slice(start, start + rows_at_once)
        values = read_rows(rows)
        colors = values[..., :num_colors]
        reduced = _table(white)[colors]
        pixels[rows, :, :num_colors] = reduced
        if bands > num_colors:
            pixels[rows, :, -1] = _table(_FULL)[values[..., -1]]
        if has_key:
            pixels[rows, :, -1] = np.where((colors == np.array(key)).all(-1), 0, 255)
        highest = max(highest, int(colors.max()))
        counts += np.bincount(reduced.ravel(), minlength=256)
    levels = sum(1 << int(level) for level in np.flatnonzero(counts))
    result = Image.frombytes(alpha_mode, image.size, pixels.tobytes())
    if "icc_profile" in image.info:
        result.info["icc_profile"] = image.info["icc_profile"]
    return result, ValueRange(white, highest, levels)


@functools.lru_cache(maxsize=4)
def _table(white: int) -> UInt8[np.ndarray, " values"]:
    """The nearest byte of each value; those above white become 255."""
    values = np.arange(_FULL + 1, dtype=np.int64)
    return np.minimum((510 * values + white) // (2 * white), 255).astype(np.uint8)


def _reader(image: Image.Image, content: bytes) -> tuple[Callable[[slice], np.ndarray], str]:
    """What gives rows of 16-bit values, and the mode of their channels."""
    raw_modes = sorted({_raw_mode(tile.args) for tile in _reopen(content).tile})
    raw_mode = raw_modes[0] if len(raw_modes) == 1 else "planes"
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        gray = np.asarray(image)
        inverts = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        mask = np.uint16(_FULL if inverts else 0)
        return lambda rows: gray[rows, :, None].astype(np.uint16) ^ mask, "L"
    if raw_mode == "LA;16B":  # as four bytes per pixel, both halves of gray and of alpha
        quads = np.asarray(_reopen(content, "RGBA"))
        return lambda rows: _join(quads[rows, :, 0::2], quads[rows, :, 1::2]), "LA"
    kind, _, order = raw_mode.partition(";16")
    swapped = {"L": "B", "B": "L", "N": _other_than_native()}.get(order)
    if swapped is None or kind not in {"RGB", "RGBX", "RGBA", "CMYK"}:
        raise ValueError(f"{image.mode} in {raw_mode}, a layout of many bits that is not read")
    # Read as if its bytes were in the other order, an image shows its lower halves.
    upper, lower = np.asarray(image), np.asarray(_reopen(content, f"{kind};16{swapped}"))
    return lambda rows: _join(upper[rows], lower[rows]), image.mode


def _join(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    values: np.ndarray = (upper.astype(np.uint16) << 8) | lower
    return values


def _other_than_native() -> str:
    return "B" if sys.byteorder == "little" else "L"


def _raw_mode(arguments: object) -> str:
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _reopen(content: bytes, raw_mode: str | None = None) -> ImageFile:
    image = Image.open(io.BytesIO(content), formats=("PNG", "TIFF"))
    assert isinstance(image, ImageFile)
    if raw_mode is not None:
        image.tile = [
            tile._replace(
                args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode
            )
            for tile in image.tile
        ]
    return image
