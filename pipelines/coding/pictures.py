"""Pictures of any size to bytes and back: padded, encoded, coded, and the reverse."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.coding.codec import Codec
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.errors import InputError

MAX_QUALITY = 1e6


def search_of(codec: Codec, quality: float | None) -> SearchConfig:
    """The search that weighs bits by μ = `quality`; none where that is None or 0.

    Raises:
        InputError: it is no such number, or the tokenizer does not know what codes cost.
    """
    if not quality:
        return NO_SEARCH
    if isinstance(quality, bool) or not math.isfinite(quality) or not 0 < quality <= MAX_QUALITY:
        raise InputError(f"quality must be None or from 0 to {MAX_QUALITY:,.0f}, got {quality}")
    if codec.tokenizer.code_prior is None:
        raise InputError(
            f"quality must be None for a tokenizer without a prior of its own, got {quality}"
        )
    return SearchConfig(rate_weight=quality)


def compressed(
    codec: Codec,
    images: Float[Tensor, "batch channels height width"],
    quality: float | None,
    model: str | None,
) -> bytes:
    """A file of one image on [-1, 1], of any size.

    Raises:
        InputError: it is more than one or not what the networks take, or an argument is wrong.
    """
    if len(images) != 1:
        raise InputError(f"image must be one picture, got {len(images)}")
    search, model = search_of(codec, quality), codec.check_model(model)
    height, width = images.shape[2:]
    codec.check_size(width, height, model)
    for axis, (side, padded) in enumerate(
        zip((height, width), codec.padded_size(width, height), strict=True), 2
    ):
        places = np.pad(np.arange(side), (0, padded - side), mode="reflect")
        images = images.index_select(axis, torch.from_numpy(places).to(images.device))
    return codec.encode(codec.tokenizer.encode(images, search), width, height, model)


def decompressed(codec: Codec, content: bytes) -> Float[Tensor, "1 channels height width"]:
    """The image of a file, on about [-1, 1], from as many layers as it has.

    Raises:
        InputError: see `Codec.decode`.
    """
    coded = codec.decode(content)
    images = codec.tokenizer.decode(coded.indices, coded.num_layers)
    return images[:, :, : coded.height, : coded.width]
