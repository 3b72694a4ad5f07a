"""Shapes of code indices, and whether given images and indices fit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.config import CodeMapConfig, TokenizerConfig
from tokenizer.quantizers import GroupConfig
from tokenizer.storage.errors import InputError


def code_maps_of(
    groups: Sequence[GroupConfig], height: int, width: int
) -> tuple[CodeMapConfig, ...]:
    """Code maps of an image of this size, one per resolution group, coarse to fine.

    Raises:
        InputError: the coarsest downsampling does not divide the size.
    """
    coarsest = groups[0].downsampling
    if height % coarsest or width % coarsest or not height or not width:
        raise InputError(
            f"image size must be divisible by the coarsest downsampling {coarsest}, "
            f"got {height} by {width}"
        )
    return tuple(
        CodeMapConfig(
            height=height // group.downsampling,
            width=width // group.downsampling,
            codebook_sizes=group.codebook_sizes,
            code_dim=group.code_dim,
        )
        for group in groups
    )


def check_images(images: Tensor, config: TokenizerConfig) -> None:
    """Compares type, channels and size of images with what the tokenizer takes.

    Raises:
        InputError: they do not fit.
    """
    if images.shape[1] != config.channels:
        raise InputError(f"images must have {config.channels} channels, got {images.shape[1]}")
    if not images.is_floating_point():
        raise InputError(f"images must be floating point on [-1, 1], got {images.dtype}")
    code_maps_of(config.groups, *images.shape[-2:])


def check_indices(
    indices: Sequence[Tensor],
    code_maps: Sequence[CodeMapConfig],
    name: str = "indices",
    lowest: int = 0,
) -> None:
    """Waits for the device and checks number, types, shapes and values.

    Raises:
        InputError: `indices`, called `name` in the message, do not fit the code maps, or a value
            is below `lowest`.
    """
    if len(indices) != len(code_maps):
        raise InputError(f"{name} must hold {len(code_maps)} maps, got {len(indices)}")
    for group, (tensor, code_map) in enumerate(zip(indices, code_maps, strict=True)):
        shape = (len(indices[0]), code_map.depth, code_map.height, code_map.width)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name}[{group}] must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.int64:
            raise InputError(f"{name}[{group}] must be int64, got {tensor.dtype}")
        for layer, size in enumerate(code_map.codebook_sizes):
            values = tensor[:, layer]
            wrong = values[(values < lowest) | (values >= size)]
            if len(wrong):
                raise InputError(
                    f"{name}[{group}], layer {layer}, must lie in [{lowest}, {size}), "
                    f"got {int(wrong[0])}"
                )
