"""From an image file to a square array of bytes, whatever the file holds.

What is done with the content of a file; `folder_scan.py` says what is done with its name.

* PNG, JPEG and WebP are used, told by their content: a wrong suffix among these is no obstacle.
* Converted: 16 bits per channel to 8, a palette and one bit per pixel to colors, CMYK to RGB; of
  an animation or a file of several pictures, the first one.
* Unreadable: empty, truncated or damaged as far as the format can tell, of another format, not a
  regular file (a pipe is not waited for), or without permission; and whatever would cost too
  much, known before any pixel is read: more than MAX_BYTES, MAX_PIXELS or MAX_SCANNED_PIXELS.

JPEG and lossy WebP carry no checksum, so a flipped bit in one may go unnoticed and be used.
"""

import io
import re
import stat
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Channels = Literal[1, 2, 3, 4]

VERSION = 1
"""Raised whenever the same file would give other bytes: decoded images are cached."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_BYTES = 2**28
"""Size of a file."""
MAX_PIXELS = 2**26
"""Width times height."""
MAX_SCANNED_PIXELS = 2**30
"""Width times height times the scans of a JPEG: a small file can hold thousands of scans."""

_LARGE_PIXELS = 2**24
_large_image = threading.Lock()
_FORMATS = ("PNG", "JPEG", "WEBP")
_FORMAT_OF_SUFFIX = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# In a scan, 255 is followed by 0 or a restart marker; anything else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}


class UnreadableImageError(Exception):
    """A file is not a whole PNG, JPEG or WebP image; the message is the reason."""


class DecodedImage(NamedTuple):
    """The bytes of an image, and what had to be done beyond resizing and cropping."""

    pixels: UInt8[np.ndarray, "size size channels"]
    changes: tuple[str, ...]
    """Empty for a still 8-bit gray or color image under the suffix of its format."""


def describe_conversion(image_size: int, channels: Channels) -> str:
    """What happens to each image, in words."""
    alpha = "kept" if channels in (2, 4) else "composited on white"
    return (
        f"shorter side resized to {image_size} (Pillow bicubic, antialiased), center crop, "
        f"{_MODES[channels]}, alpha {alpha}"
    )


def decode_image(path: Path, image_size: int, channels: Channels) -> DecodedImage:
    """Decodes a whole file, upright by its EXIF orientation; of an animation, the first frame.

    Raises:
        UnreadableImageError: absent, damaged, of another format or too costly.
        MemoryError: the message names the file.
    """
    try:
        content = _read_file(path)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_cost(image, content)
            changes = _describe_changes(image, content, path.suffix.lower())
            with _turn(image):
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return DecodedImage(convert_image(image, image_size, channels), changes)
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise MemoryError(f"decoding {path}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        reason = (isinstance(error, OSError) and error.strerror) or str(error).split("\n")[0]
        # The file is read into memory first, of which Pillow would name the address.
        reason = re.sub(r" <_io\.BytesIO.*>", "", reason)
        raise UnreadableImageError(reason or type(error).__name__) from error


def _read_file(path: Path) -> bytes:
    status = path.stat()
    # Opening a pipe that nobody writes to would wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError("not a regular file")
    if status.st_size == 0:
        raise UnreadableImageError("empty")
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(f"{status.st_size:,} bytes are more than {MAX_BYTES:,}")
    with path.open("rb") as file:
        return file.read(status.st_size)


def _check_cost(image: Image.Image, content: bytes) -> None:
    num_pixels = image.width * image.height
    if num_pixels == 0:
        raise UnreadableImageError("no pixels")
    if num_pixels > MAX_PIXELS:
        raise UnreadableImageError(
            f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}"
        )
    if _format(image) == "JPEG":
        num_scans = _count_scans(content)
        if num_scans * num_pixels > MAX_SCANNED_PIXELS:
            raise UnreadableImageError(
                f"{num_scans} scans of {image.width} × {image.height} pixels are more than "
                f"{MAX_SCANNED_PIXELS:,}"
            )


def _count_scans(content: bytes) -> int:
    """Scans of a JPEG up to its end; what follows, such as a video, is none of it."""
    count, position = 0, 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _END_OF_IMAGE:
            break
        if marker == 0xFF or marker in _BARE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            count += 1
            end = _END_OF_SCAN.search(content, position)
            position = end.start() if end else len(content)
    return count


def _format(image: Image.Image) -> str:
    # Pillow calls a JPEG of several pictures, as phones take them, MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _describe_changes(image: Image.Image, content: bytes, suffix: str) -> tuple[str, ...]:
    changes = []
    found = _format(image)
    if _FORMAT_OF_SUFFIX.get(suffix, found) != found:
        changes.append(f"holds {found}, read as such")
    # The bit depth in the header: Pillow drops the lower bits of colors as it reads.
    if found == "PNG" and content[24] == 16:
        changes.append("16 bits per channel, reduced to 8")
    if image.mode in {"P", "PA"}:
        changes.append("palette, looked up")
    if image.mode == "1":
        changes.append("one bit per pixel, black and white")
    if image.mode == "CMYK":
        changes.append("CMYK, converted to RGB")
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1:
        changes.append(f"{num_frames} frames, the first one is taken")
    return tuple(changes)


def _turn(image: Image.Image) -> AbstractContextManager[object]:
    """Large images come one at a time: threads must not hold many of them at once."""
    return _large_image if image.width * image.height > _LARGE_PIXELS else nullcontext()


def convert_image(
    image: Image.Image, image_size: int, channels: Channels
) -> UInt8[np.ndarray, "size size channels"]:
    """Resizes the shorter side to `image_size` and crops the center.

    Alpha is composited on white for 1 and 3 channels and kept for 2 and 4. 16-bit gray is scaled
    to 8 bits, CMYK goes through Pillow's plain conversion to RGB.
    """
    has_alpha = image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        # The nearest byte; a half does not occur.
        rounded = (np.asarray(image).astype(np.uint32) + 128) // 257
        image, has_alpha = Image.fromarray(rounded.astype(np.uint8)), False
    elif image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        image = image.convert("RGB")
    if has_alpha:
        image = image.convert("RGBA")
        if channels in (1, 3):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
            del white  # as large as the image
    image = image.convert(_MODES[channels])
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Resizing only what the crop keeps gives the same pixels without a huge image in between.
    square = image.resize(
        (image_size, image_size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    return np.asarray(square).reshape(image_size, image_size, channels)
