"""From whatever a person has, a file or an array, say, to images as a tokenizer was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from pipelines.data.conversion import Channels
from pipelines.data.decoding import (
    UnreadableImageError,
    decode_image,
    decode_opened,
    describe_conversion,
)
from pipelines.images import to_float
from tokenizer.fields import check_whole
from tokenizer.storage.errors import InputError

Picture = Image.Image | str | Path | np.ndarray | Tensor
Pictures = Picture | Sequence[Picture]
ImageSize = int | Literal["original"] | None
Mask = Image.Image | str | Path | np.ndarray | Tensor

KINDS = (
    "a PIL image, a path, a uint8 array (height, width, channels) or a tensor (channels, height, "
    "width)"
)


class Conversion(NamedTuple):
    """What becomes of pictures. Tensors are none: they are images already, taken as they are."""

    channels: Channels
    multiple: int
    """Of pixels, in the height and width that the networks take."""
    image_size: int | None
    """Side of the square that each becomes: the shorter side is resized to it (Pillow bicubic,
    antialiased), then the center is cropped. None crops alone, to the nearest multiples below."""
    white_value: int | None = None
    """Value of a 16-bit picture that becomes white; None is the highest."""

    def resized(self, image_size: ImageSize) -> "Conversion":
        """To another size, or "original"; None changes nothing.

        Raises:
            InputError: the networks do not take this size.
        """
        if image_size is None:
            return self
        if image_size == "original":
            return self._replace(image_size=None)
        check_whole("image_size", image_size, 1)
        if image_size % self.multiple:
            raise InputError(f"image_size must be a multiple of {self.multiple}, got {image_size}")
        return self._replace(image_size=int(image_size))

    def describe(self) -> str:
        """In words."""
        if self.image_size is not None:
            return describe_conversion(self.image_size, self.channels, self.white_value)
        return f"center cropped to multiples of {self.multiple} pixels"


class PreparedPicture(NamedTuple):
    """One picture as bytes, and the size that it had."""

    image: UInt8[Tensor, "channels height width"]
    size: tuple[int, int]
    """Width and height, upright."""


def preprocess(
    pictures: Any, conversion: Conversion
) -> Float[Tensor, "batch channels height width"]:
    """Images on [-1, 1] of pictures, as training makes them of files.

    Args:
        pictures: PIL images, paths or uint8 arrays (H, W, C) and (H, W), converted; tensors
            (C, H, W), as they are: floats on [-1, 1] or bytes. One of these, a list of them, or a
            whole batch with one dimension more.
        conversion: what is done.

    Raises:
        InputError: a picture cannot be read, the networks do not take it, or sizes differ.
    """
    if isinstance(pictures, Tensor) and pictures.ndim == 4 and pictures.is_floating_point():
        return pictures
    entries = _entries(pictures)
    images = []
    for number, entry in enumerate(entries):
        name = "images" if len(entries) == 1 else f"images[{number}]"
        if isinstance(entry, Tensor) and entry.ndim == 3 and entry.is_floating_point():
            images.append(entry)
        else:
            images.append(to_float(prepare_picture(entry, conversion, name).image[None])[0])
    for image in images:
        if image.shape != images[0].shape:
            sizes = " and ".join(
                _size(entry.shape[2], entry.shape[1]) for entry in (images[0], image)
            )
            raise InputError(f"images must have one size and type where they are many, got {sizes}")
    return torch.stack(images)


def _entries(pictures: Any) -> Sequence[Any]:
    if isinstance(pictures, Tensor | np.ndarray):
        pictures = list(pictures) if pictures.ndim == 4 else [pictures]
    elif not isinstance(pictures, Sequence) or isinstance(pictures, str):
        pictures = [pictures]
    if not len(pictures):
        raise InputError("images must hold at least one, got none")
    entries: Sequence[Any] = pictures
    return entries


def prepare_picture(picture: Any, conversion: Conversion, name: str = "image") -> PreparedPicture:
    """One picture as bytes.

    Raises:
        InputError: it cannot be read, or the networks do not take it; `name` names it.
    """
    if isinstance(picture, Tensor):
        return _prepare_tensor(picture, name)
    numbers = (conversion.image_size, conversion.channels, conversion.white_value)
    try:
        if isinstance(picture, str | Path):
            name = f"{name}: {picture}"
            decoded = decode_image(Path(picture), *numbers)
        elif isinstance(picture, np.ndarray):
            decoded = decode_opened(_array_picture(picture, name), *numbers)
        elif isinstance(picture, Image.Image):
            decoded = decode_opened(picture, *numbers)
        else:
            kinds = f"{KINDS}, or a list of them" if name == "images" else KINDS
            raise InputError(f"{name} must be {kinds}, got {type(picture).__name__}")
    except UnreadableImageError as error:
        raise InputError(f"{name} is not a readable image: {error}") from error
    pixels = decoded.pixels
    if conversion.image_size is None:
        pixels = _crop(pixels, conversion.multiple)
        if not pixels.size:
            least = _size(conversion.multiple, conversion.multiple)
            raise InputError(
                f"{name} must have at least {least} pixels, got {_size(*decoded.size)}"
            )
    return PreparedPicture(torch.tensor(pixels).movedim(-1, 0).contiguous(), decoded.size)


def _prepare_tensor(image: Tensor, name: str) -> PreparedPicture:
    if image.ndim != 3 or image.dtype != torch.uint8:
        raise InputError(
            f"{name} must be floats on [-1, 1] or bytes (channels, height, width) where it is a "
            f"tensor, got {tuple(image.shape)} of {image.dtype}"
        )
    return PreparedPicture(image, (image.shape[2], image.shape[1]))


def _array_picture(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in range(1, 5):
        raise InputError(
            f"{name} must be uint8 (height, width) or (height, width, channels) where it is an "
            f"array, got {array.shape} of {array.dtype}"
        )
    if not array.size:
        raise InputError(f"{name} must have pixels, got {array.shape}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _crop(pixels: np.ndarray, multiple: int) -> np.ndarray:
    """The center, of the nearest multiples below."""
    height, width = (side - side % multiple for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def prepare_mask(
    mask: Any, size: tuple[int, int], conversion: Conversion, is_tensor: bool
) -> Bool[Tensor, "height width"]:
    """Where an image is to be drawn anew: resized and cropped with its picture.

    A pixel is drawn anew if any part of it is.

    Args:
        mask: white is drawn anew, and black is known: a PIL image, a path of one, or an array or
            tensor (H, W) of bytes, from 128 up; or of nothing but zeros and ones, of any type.
        size: width and height of the picture.
        conversion: of the picture.
        is_tensor: whether the picture is a tensor, which is taken as it is.

    Raises:
        InputError: it is no mask, or of another size than the picture.
    """
    values = _mask_values(mask)
    if values.shape != size[::-1]:
        found = _size(*values.shape[::-1])
        raise InputError(f"mask must have the size of image, {_size(*size)}, got {found}")
    if is_tensor:
        return torch.tensor(values)
    if conversion.image_size is None:
        return torch.tensor(_crop(values, conversion.multiple))
    side = min(size)
    for _ in range(2):  # rows, then columns, which are rows once it is transposed
        values = _touched_rows(values, side, conversion.image_size).T
    return torch.tensor(values)


def _touched_rows(
    values: Bool[np.ndarray, "rows columns"], side: int, num_rows: int
) -> Bool[np.ndarray, "num_rows columns"]:
    """Of the `side` rows about the center, cut into `num_rows` equal strips, what each touches."""
    edges = (len(values) - side) * num_rows + 2 * side * np.arange(num_rows + 1)  # / (2 num_rows)
    first, last = edges[:-1] // (2 * num_rows), -(-edges[1:] // (2 * num_rows))
    sums = np.concatenate([np.zeros((1, values.shape[1]), int), values.cumsum(0)])
    return np.asarray(sums[last] > sums[first])


def _mask_values(mask: Any) -> Bool[np.ndarray, "height width"]:
    values = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    if isinstance(mask, Image.Image):
        values = np.asarray(mask.convert("L"))
    elif isinstance(mask, str | Path):
        try:
            values = decode_image(Path(mask), None, 2).pixels[..., 0]  # without its alpha
        except UnreadableImageError as error:
            raise InputError(f"mask: {mask} is not a readable image: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or not values.size:
        found = getattr(values, "shape", type(values).__name__)
        raise InputError(
            f"mask must be a PIL image, a path or an array (height, width), got {found}"
        )
    if values.dtype == np.uint8 and values.max() > 1:
        return values >= 128
    if not np.isin(values, (0, 1)).all():
        raise InputError(
            f"mask must hold bytes, or nothing but zeros and ones, got {values.dtype} from "
            f"{values.min()} to {values.max()}"
        )
    return values.astype(bool)


def _size(width: int, height: int) -> str:
    return f"{width} by {height}"
