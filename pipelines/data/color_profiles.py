"""From the colors of a device to sRGB, by the ICC profile that an image carries."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 2**24
"""The largest in use, of printing presses, are a sixth of it."""
SAME_COLORS = 2
"""A profile that moves no color by more, of 255, is one of the many that call themselves sRGB."""

UNUSABLE = "color profile that cannot be used, colors taken as they are"

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Converts colors by the profile in `image.info`, and says in words what was done.

    Relative colorimetric, with black point compensation: white stays white and black stays black.
    An image without a profile, with one of sRGB, or with one that is broken or of another kind of
    colors stays as it is; so do those of the kinds that no profile describes, such as Lab.
    """
    if "icc_profile" not in image.info:
        return image, ""
    profile = image.info["icc_profile"] or b""  # None where Pillow cannot put it together
    plain = _without_palette(image)
    mode = plain.mode.removesuffix("A") or "L"
    try:
        if mode not in _SPACES:
            raise ValueError(f"of {image.mode}")
        if len(profile) > MAX_PROFILE_BYTES:
            raise ValueError(f"{len(profile):,} bytes are more than {MAX_PROFILE_BYTES:,}")
        transform = _transform(bytes(profile), mode)
        if transform is None:
            return image, ""
        alpha = plain.getchannel("A") if plain.mode.endswith("A") else None
        colors = plain if plain.mode == mode else plain.convert(mode)
        colors = ImageCms.applyTransform(colors, transform) or colors
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        return image, UNUSABLE + f" ({reason})"
    if alpha is not None:
        colors.putalpha(alpha)
    if mode == "CMYK":
        return colors, "CMYK, converted to RGB by its color profile"
    return colors, "color profile, converted to sRGB"


def _without_palette(image: Image.Image) -> Image.Image:
    """Transparency of whatever kind becomes a channel, a palette its colors."""
    if "transparency" in image.info and image.mode in {"1", "L", "RGB", "P"}:
        rgba = image.convert("RGBA")
        return rgba.convert("LA") if image.mode in {"1", "L"} else rgba
    simpler = {"1": "L", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "YCbCr": "RGB"}
    mode = simpler.get(image.mode, image.mode)
    return image if mode == image.mode else image.convert(mode)


@functools.lru_cache(maxsize=16)  # most folders hold a few profiles; building takes milliseconds
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the colors are those of sRGB already.

    Raises:
        ImageCms.PyCMSError, OSError, ValueError: the profile is broken, or of other colors.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _SPACES[mode]:
        raise ValueError(f"it is of {space}, the image of {_SPACES[mode]}")
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    colors = Image.fromarray(grid).convert(mode)
    converted = ImageCms.applyTransform(colors, transform)
    expected = np.asarray(colors.convert("RGB")).astype(int)
    is_same = np.abs(np.asarray(converted).astype(int) - expected).max() <= SAME_COLORS
    return None if is_same else transform
