"""From an image file to a square array of bytes."""

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Channels = Literal[1, 2, 3, 4]

VERSION = 1
"""Raised whenever the same file would give other bytes: decoded images are cached."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class UnreadableImageError(Exception):
    """A file is not a whole PNG, JPEG or WebP image; the message is the reason."""


def describe_conversion(image_size: int, channels: Channels) -> str:
    """What happens to each image, in words."""
    alpha = "kept" if channels in (2, 4) else "composited on white"
    return (
        f"shorter side resized to {image_size} (Pillow bicubic, antialiased), center crop, "
        f"{_MODES[channels]}, alpha {alpha}"
    )


def read_image(
    path: Path, image_size: int, channels: Channels
) -> UInt8[np.ndarray, "size size channels"]:
    """Decodes a whole file, upright by its EXIF orientation; of an animation, the first frame.

    Raises:
        UnreadableImageError: absent, damaged, or of another format, whatever its suffix.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        reason = (isinstance(error, OSError) and error.strerror) or str(error).split("\n")[0]
        raise UnreadableImageError(reason or type(error).__name__) from error
    return convert_image(upright, image_size, channels)


def convert_image(
    image: Image.Image, image_size: int, channels: Channels
) -> UInt8[np.ndarray, "size size channels"]:
    """Resizes the shorter side to `image_size` and crops the center.

    Alpha is composited on white for 1 and 3 channels and kept for 2 and 4. 16-bit gray is scaled
    to 8 bits, CMYK goes through Pillow's plain conversion to RGB.
    """
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        image = image.convert("RGB")
    image = image.convert("RGBA")
    if channels in (1, 3):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert(_MODES[channels])
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Resizing only what the crop keeps gives the same pixels without a huge image in between.
    square = image.resize(
        (image_size, image_size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    return np.asarray(square).reshape(image_size, image_size, channels)
