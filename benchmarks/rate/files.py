"""Other codecs, by Pillow and its plugins, and what is measured of any codec."""

import io
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pillow_jxl  # noqa: F401  # registers the format
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from pipelines.evaluation.metrics import ImageErrors, image_errors, reconstruction_metrics

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
NUM_SCALES = 4
"""128 pixels are too few for five scales of a window of 11."""


class Format(NamedTuple):
    """A codec as it is asked for."""

    name: str
    """Pillow's."""
    options: dict[str, Any]
    qualities: tuple[int, ...]

    def encode(self, picture: Image.Image, quality: int) -> bytes:
        """A file."""
        content = io.BytesIO()
        picture.save(content, self.name, quality=quality, **self.options)
        return content.getvalue()

    def header_bytes(self, quality: int) -> int:
        """Of a file of one gray pixel, at the same quality and options."""
        return len(self.encode(Image.new("RGB", (1, 1), (128, 128, 128)), quality))


FORMATS = {
    "JPEG": Format("JPEG", {"optimize": True}, (1, 3, 5, 8, 12, 18, 25, 40, 60, 80)),
    "WebP": Format("WEBP", {"method": 6}, (0, 2, 5, 10, 20, 35, 50, 75)),
    "AVIF": Format("AVIF", {"speed": 4}, (1, 5, 10, 15, 20, 30, 40, 60)),
    "JPEG XL": Format("JXL", {"effort": 7}, (0, 3, 6, 10, 20, 35, 50, 75)),
}


def to_picture(image: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """For Pillow."""
    return Image.fromarray(image.movedim(0, -1).contiguous().numpy())


def to_tensor(picture: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """From Pillow."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)


def opened(content: bytes) -> Image.Image:
    """The picture of a file, decoded."""
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture


class Coded(NamedTuple):
    """What a codec makes of pictures."""

    images: UInt8[Tensor, "batch 3 height width"]
    num_bytes: list[int]
    encoding_seconds: float
    """Of the processor, for each."""
    decoding_seconds: float


def coded(
    originals: UInt8[Tensor, "batch 3 height width"],
    encode: Callable[[Image.Image], bytes],
    decode: Callable[[bytes], Image.Image],
) -> Coded:
    """All pictures, one by one, to files and back."""
    pictures = [to_picture(image) for image in originals]
    started = time.process_time()
    contents = [encode(picture) for picture in pictures]
    between = time.process_time()
    decoded = [decode(content) for content in contents]
    ended = time.process_time()
    return Coded(
        torch.stack([to_tensor(picture) for picture in decoded]),
        [len(content) for content in contents],
        (between - started) / len(pictures),
        (ended - between) / len(pictures),
    )


def point_of(
    originals: UInt8[Tensor, "batch 3 height width"],
    result: Coded,
    quality: float,
    header_bytes: float,
) -> dict[str, Any]:
    """Means over the pictures; RMSE of the set, on [0, 1]."""
    errors = image_errors(originals, result.images)
    metrics = reconstruction_metrics(ImageErrors(*errors))
    return {
        "quality": quality,
        "bytes": float(np.mean(result.num_bytes)),
        "header_bytes": header_bytes,
        "RMSE": metrics["RMSE"],
        "PSNR": metrics["PSNR"],
        "MS-SSIM": multiscale_similarity(originals, result.images),
        "encoding_seconds": round(result.encoding_seconds, 5),
        "decoding_seconds": round(result.decoding_seconds, 5),
    }


def multiscale_similarity(
    originals: UInt8[Tensor, "batch 3 height width"], others: UInt8[Tensor, "batch 3 height width"]
) -> float:
    """MS-SSIM of the first scales, their weights made to sum to 1; mean over the pictures."""
    weights = SCALE_WEIGHTS[:NUM_SCALES]
    betas = tuple(weight / sum(weights) for weight in weights)
    value = multiscale_structural_similarity_index_measure(
        others.float() / 255, originals.float() / 255, data_range=1.0, betas=betas
    )
    assert isinstance(value, Tensor)
    return value.item()


def within(
    image: UInt8[Tensor, "3 height width"], form: Format, num_bytes: int
) -> tuple[Image.Image, int]:
    """The file of the highest quality with at most so many bytes, or else the smallest; its bytes.

    By bisection, since bytes grow with the quality.
    """
    picture = to_picture(image)
    low, high = form.qualities[0], form.qualities[-1]
    best = form.encode(picture, low)
    while low < high:
        middle = (low + high + 1) // 2
        content = form.encode(picture, middle)
        if len(content) <= num_bytes:
            low, best = middle, content
        else:
            high = middle - 1
    return opened(best), len(best)
