"""From an image file to a square array of bytes, whatever the file holds.

What is done with the content of a file; `folder_scan.py` says what is done with its name.

* PNG, JPEG, WebP, BMP and TIFF are used, known by their content: a wrong suffix among these is no
  obstacle.
* Converted: 16 bits per channel to 8, color profiles to sRGB, a palette and one bit per pixel to
  colors, CMYK to RGB; of an animation or a file of several pictures, the first one. What is smaller
  than the square is enlarged, and what is longer than twice its width loses more than half: both
  are said.
* Unreadable: empty, truncated or damaged as far as the format can tell, of another format, of
  floating-point or 32-bit numbers, not a regular file (a pipe is not waited for), or without
  permission; and whatever would cost too much (`limits.py`), known before any pixel is read.

JPEG, lossy WebP, BMP and most TIFF carry no checksum, so a flipped bit in one may go unnoticed and
be used.
"""

import io
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from pipelines.data.color_profiles import to_srgb
from pipelines.data.conversion import (
    MODES,
    Channels,
    Crop,
    convert_image,
    describe_colors,
    describe_size,
)
from pipelines.data.formats import FORMAT_OF_SUFFIX, SUFFIXES_OF
from pipelines.data.limits import check_cost, check_size, check_tables
from pipelines.data.sixteen_bits import ValueRange, bits_per_channel, reduce_to_eight_bits

VERSION = 2
"""Raised whenever the same file would give other bytes: decoded images are cached."""

_LARGE_PIXELS = 2**24
_large_image = threading.Lock()
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = "turned upright by its EXIF orientation"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_BROKEN_PROFILE = b"\0\0\0\4iCCP-\0\0-" + struct.pack(">I", zlib.crc32(b"iCCP-\0\0-"))


class UnreadableImageError(Exception):
    """A file is not a whole image of a known format; the message is the reason."""


class DecodedImage(NamedTuple):
    """The bytes of an image, and what had to be done beyond resizing and cropping."""

    pixels: UInt8[np.ndarray, "height width channels"]
    changes: tuple[str, ...]
    """Each what was done, then particulars in parentheses; empty for a still 8-bit gray or color
    image in sRGB, under the suffix of its format, of which half or more is kept."""
    size: tuple[int, int]
    """Width and height before resizing, upright."""
    value_range: ValueRange | None = None
    """Of more than 8 bits per channel."""


def describe_conversion(image_size: int, channels: Channels, white_value: int | None = None) -> str:
    """What happens to each image, in words."""
    alpha = "kept" if channels in (2, 4) else "composited on white"
    white = "" if white_value is None else f", {white_value} of 16 bits is white"
    return (
        f"shorter side resized to {image_size} (Pillow bicubic, antialiased), center crop, "
        f"{MODES[channels]}, alpha {alpha}{white}"
    )


def decode_image(
    path: Path, image_size: int | None, channels: Channels, white_value: int | None = None
) -> DecodedImage:
    """Decodes a whole file, upright by its EXIF orientation; of an animation, the first frame.

    `image_size` None keeps the size and shape. `white_value` is the value of a 16-bit file that
    becomes 255; None takes the highest possible.

    Raises:
        UnreadableImageError: absent, damaged, of another format or too costly.
        MemoryError: the message names the file.
    """
    with _unreadable(str(path)):
        content = read_file(path)
    return decode_content(content, str(path), image_size, channels, white_value)


def decode_content(
    content: bytes,
    name: str,
    image_size: int | None,
    channels: Channels,
    white_value: int | None = None,
    least_side: int | None = None,
    crop: Crop | None = None,
) -> DecodedImage:
    """Does with the bytes of a file what `decode_image` does with the file: with the same result.

    With `least_side` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as far as a shorter side of
    so many pixels remains. `crop` takes the place of the center crop.

    Raises:
        UnreadableImageError: as `decode_image`.
        MemoryError: the message gives the `name`.
    """
    suffix = os.path.splitext(name)[1].lower()
    reading = (image_size, channels, white_value, least_side, crop)
    with _unreadable(name):
        check_size(len(content))
        for readable in _without_long_chunks(content):
            try:
                return _decode(readable, suffix, *reading)
            except ValueError as error:  # so Pillow bounds what text and profiles may unpack to
                if "MAX_TEXT" not in str(error):
                    raise
                bounded = error
        raise bounded


def decode_opened(
    image: Image.Image, image_size: int | None, channels: Channels, white_value: int | None = None
) -> DecodedImage:
    """Does with an image in memory what `decode_image` does with a file: with the same result.

    But of colors of 16 bits Pillow has dropped the lower half; training rounds.

    Raises:
        UnreadableImageError: of floating-point or 32-bit numbers, without pixels, or of a file that
            turns out to be damaged.
        MemoryError: as `decode_image`.
    """
    with _unreadable("an image"):
        image.load()
        if not image.width * image.height:
            raise ValueError("no pixels")
        if image.mode in {"I", "F"}:
            raise ValueError(f"mode {image.mode}, numbers without a common white")
        if image.mode.startswith("I;16"):  # by way of a file: one place reduces these bits
            gray = _upright(image, Image.fromarray(np.asarray(image).astype(np.uint16)))
            gray.save(buffer := io.BytesIO(), "PNG", icc_profile=image.info.get("icc_profile"))
            reading = (image_size, channels, white_value, None, None)
            return _decode(buffer.getvalue(), ".png", *reading)
        image = _upright(image, to_srgb(image)[0])
        return DecodedImage(convert_image(image, image_size, channels), (), image.size)


@contextmanager
def _unreadable(name: str) -> Iterator[None]:
    """Turns what goes wrong with an image into an `UnreadableImageError`, but for memory."""
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"decoding {name}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        reason = (isinstance(error, OSError) and error.strerror) or str(error).split("\n")[0]
        # The file is read into memory first, of which Pillow would name the address.
        reason = re.sub(r" <_io\.BytesIO.*>", "", reason)
        raise UnreadableImageError(reason or type(error).__name__) from error


def read_file(path: Path) -> bytes:
    """The bytes of a regular file that is not too large; else an OSError or a ValueError."""
    status = path.stat()
    # Opening a pipe that nobody writes to would wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    check_size(status.st_size)
    with path.open("rb") as file:
        return file.read(status.st_size)


def _without_long_chunks(content: bytes) -> Iterator[bytes]:
    """The file; then, of a PNG, what is left without its texts, and with a broken profile."""
    yield content
    if content.startswith(_PNG_START):
        removed = dict.fromkeys((b"tEXt", b"zTXt", b"iTXt"), b"")
        yield _replace_chunks(content, removed)
        yield _replace_chunks(content, {**removed, b"iCCP": _BROKEN_PROFILE})


def _replace_chunks(content: bytes, replacements: dict[bytes, bytes]) -> bytes:
    parts, position = [_PNG_START], len(_PNG_START)
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        end = position + 12 + length
        kind = content[position + 4 : position + 8]
        parts.append(replacements.get(kind, content[position:end]))
        position = end
    return b"".join(parts)


def _decode(
    content: bytes,
    suffix: str,
    image_size: int | None,
    channels: Channels,
    white_value: int | None,
    least_side: int | None,
    crop: Crop | None,
) -> DecodedImage:
    check_tables(content)
    with Image.open(io.BytesIO(content), formats=tuple(SUFFIXES_OF)) as file:
        check_cost(file, content)
        image: Image.Image = file
        changes = _describe_changes(file, suffix)
        if least_side is not None:
            file.draft(None, (least_side, least_side))  # does nothing but for a JPEG
        with _turn(file):
            file.load()
            values, bits = None, bits_per_channel(file, content)
            if bits > 8:
                image, values = reduce_to_eight_bits(file, content, white_value)
                changes.append(f"{bits} bits per channel, reduced to 8 ({values.describe()})")
            elif file.format == "PNG" and bits in (2, 4) and file.mode == "L":
                _widen_transparency(file, bits)
            image, conversion = to_srgb(image)
            changes += [conversion] if conversion else []
            changes += describe_colors(image, channels)
            if _orientation(file) in _UPRIGHT:
                changes.append(_TURNED)
            image = _upright(file, image)
            changes += describe_size(image, image_size)
            pixels = convert_image(image, image_size, channels, crop)
            return DecodedImage(pixels, tuple(changes), image.size, values)


def _upright(file: Image.Image, image: Image.Image) -> Image.Image:
    """Turns `image` by the orientation in the EXIF of `file`."""
    turn = _UPRIGHT.get(_orientation(file))
    return image if turn is None else image.transpose(turn)


def _orientation(file: Image.Image) -> int:
    """By the EXIF of a loaded file; a TIFF is turned by Pillow as it is read."""
    return int(file.getexif().get(ExifTags.Base.Orientation, 1)) if file.format != "TIFF" else 1


def _widen_transparency(image: Image.Image, bits: int) -> None:
    """Pillow widens the gray levels of 2 and 4 bits, but not the one that is transparent."""
    key = image.info.get("transparency")
    if isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**bits - 1)


def _describe_changes(image: Image.Image, suffix: str) -> list[str]:
    changes = []
    # Pillow calls a JPEG of several pictures, as phones take them, MPO.
    found = "JPEG" if image.format == "MPO" else str(image.format)
    if FORMAT_OF_SUFFIX.get(suffix, found) != found:
        changes.append(f"another format than its suffix, read as such ({found})")
    if image.mode in {"P", "PA"}:
        changes.append("palette, looked up")
    if image.mode == "1":
        changes.append("one bit per pixel, black and white")
    if found == "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _UPRIGHT:
        changes.append(_TURNED)
    # Counting the pictures of a TIFF would mean to go through all of them.
    num_frames = getattr(image, "n_frames", 1) if found != "TIFF" else 1
    if num_frames > 1 or (found == "TIFF" and image.is_animated):  # type: ignore[attr-defined]
        count = f" (of {num_frames})" if num_frames > 1 else ""
        changes.append(f"several frames, the first one is taken{count}")
    return changes


def _turn(image: Image.Image) -> AbstractContextManager[object]:
    """Large images come one at a time: threads must not hold many of them at once."""
    return _large_image if image.width * image.height > _LARGE_PIXELS else nullcontext()
