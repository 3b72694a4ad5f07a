"""Pixels: bytes, numbers on [-1, 1], Pillow images, grids."""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from tokenizer.storage.errors import InputError
from tokenizer.storage.files import naming


def to_float(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(
    images: Float[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch channels height width"]:
    """[-1, 1] to the nearest byte; what lies outside is clipped. Inverts `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name for images by their number of channels."""


def to_pil(image: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One image."""
    channels, height, width = image.shape
    values = image.movedim(0, -1).contiguous().numpy()
    return Image.frombytes(MODES[channels], (width, height), values.tobytes())


Output = Literal["pil", "np", "pt", "tensor"]
"""A list of Pillow images; bytes (B, H, W, C) of NumPy, or (B, C, H, W) of PyTorch by either name.
"""
OutputImages = list[Image.Image] | np.ndarray | Tensor


def check_output(output: object) -> None:
    """Checks the name of a kind of output.

    Raises:
        InputError: there is none such.
    """
    if output not in get_args(Output):
        raise InputError(f"output must be 'pil', 'np', 'pt' or 'tensor', got {output!r}")


def to_output(images: UInt8[Tensor, "batch channels height width"], output: Output) -> OutputImages:
    """Images on the CPU in the kind that is asked for."""
    if output == "pil":
        return [to_pil(image) for image in images]
    return images.movedim(1, -1).contiguous().numpy() if output == "np" else images


def save_png(image: Image.Image, path: Path) -> None:
    """In one step, so that what is there is whole; not flushed to the disk, which takes long."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            image.save(temporary, "PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def image_grid(
    images: UInt8[Tensor, "batch channels height width"], columns: int, scale: int | None = None
) -> Image.Image:
    """Images row by row, small ones enlarged without smoothing."""
    tiled = make_grid(images, columns, padding=2, pad_value=255)[: images.shape[1]]
    picture = to_pil(tiled)
    factor = scale or max(1, 64 // images.shape[-1])
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def comparison(
    originals: UInt8[Tensor, "batch channels height width"],
    reconstructions: UInt8[Tensor, "batch channels height width"],
) -> Image.Image:
    """Pairs side by side, four to a row: an original, then its reconstruction."""
    return image_grid(torch.stack([originals, reconstructions], 1).flatten(0, 1), 8)


class Difference(NamedTuple):
    """Between two pictures."""

    picture: Image.Image
    """Black where nothing differs, white where most does."""
    share: float
    """Of pixels that differ."""
    largest: int
    """In levels of 255."""


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """A picture with each pixel a square, the larger side as near to `side` as this gets."""
    factor = enlargement(max(picture.size), side)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def enlargement(length: int, side: int) -> int:
    """How many times, in whole numbers, a length comes nearest to a side; 1 at least."""
    return max(1, round(side / length))


def difference(one: Image.Image, other: Image.Image) -> Difference:
    """Of two pictures of one size, the most over the channels."""
    values = np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int))
    values = values.reshape(*values.shape[:2], -1).max(2)
    largest = int(values.max())
    scaled = (values * 255 // max(largest, 1)).astype(np.uint8)
    return Difference(Image.fromarray(scaled), float((values > 0).mean()), largest)


def similar_colors(vectors: Float[Tensor, "codes dim"]) -> UInt8[np.ndarray, "codes 3"]:
    """Light colors of vectors, by their three principal components."""
    centered = (vectors - vectors.mean(0)).double().numpy()
    _, directions = np.linalg.eigh(centered.T @ centered)
    components = np.zeros((len(centered), 3))
    main = centered @ directions[:, ::-1][:, :3]
    components[:, : main.shape[1]] = main
    spread = np.abs(components).max(0)
    shares = components / np.where(spread > 0, spread, 1)  # on [-1, 1]
    return (170 + 80 * shares).round().astype(np.uint8)
