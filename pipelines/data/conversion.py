"""What is done with the pixels of an image, and how that is described."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Channels = Literal[1, 2, 3, 4]
Crop = Callable[[int, int], tuple[float, float, float, float]]
"""From width and height to what is kept: left, top, right, bottom."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's, by the number of channels."""
_PLAIN_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}


def center_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def convert_image(
    image: Image.Image, image_size: int | None, channels: Channels, crop: Crop | None = None
) -> UInt8[np.ndarray, "height width channels"]:
    """Resizes the shorter side to `image_size` and crops the center; None keeps all as it is.

    What `crop` keeps, if it is given, is resized to a square instead.

    The image has 8 bits per channel, in sRGB. Alpha is composited on white for 1 and 3 channels and
    kept for 2 and 4. CMYK goes through Pillow's plain conversion to RGB.
    """
    if image.mode in {"La", "RGBa"}:  # multiplied by its alpha
        image = image.convert(image.mode.upper())
    has_alpha = image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info
    if image.mode not in _PLAIN_MODES:
        image = image.convert("RGB")
    if has_alpha:
        image = image.convert("RGBA")
        if channels in (1, 3):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
            del white  # as large as the image
    if image.mode != MODES[channels]:  # otherwise it would be copied
        image = image.convert(MODES[channels])
    if image_size is not None:
        box = (crop or center_crop)(*image.size)
        if box != (0, 0, image_size, image_size) or image.size != (image_size, image_size):
            # Resizing only what the crop keeps gives the same pixels without a huge image between.
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).reshape(image.height, image.width, channels)


def describe_colors(image: Image.Image, channels: Channels) -> list[str]:
    """What `convert_image` does beyond sizes."""
    changes = []
    if image.mode not in _PLAIN_MODES:
        changes.append(f"{image.mode}, converted to RGB")
    if channels in (1, 3) and image.has_transparency_data:
        opacity = image.convert("RGBA").getchannel("A").getextrema()
        if opacity != (255, 255):
            changes.append("transparent pixels, composited on white")
    if channels in (1, 2) and image.mode not in {"1", "L", "LA"}:
        changes.append("color, converted to gray")
    return changes


def describe_size(image: Image.Image, image_size: int | None) -> list[str]:
    """Whether an image is enlarged, and whether most of it is cropped."""
    if image_size is None:
        return []
    size = f"{image.width} × {image.height} pixels"
    shorter, longer = sorted(image.size)
    changes = []
    if shorter < image_size:
        changes.append(f"enlarged ({size})")
    if 2 * shorter < longer:
        changes.append(f"cropped by more than half ({100 * shorter / longer:.0f} % of {size} kept)")
    return changes
