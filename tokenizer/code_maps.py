"""Shapes of code indices, and whether given images and indices fit."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizer.config import CodeMapConfig, GroupConfig, TokenizerConfig
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)


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


LARGEST_VALUE = 1.5
"""Of images on [-1, 1]: resizing may overshoot, another scale goes far beyond."""
DARKEST_OF_UNIT_SCALE = 0.1


def check_images(images: Any, config: TokenizerConfig) -> None:
    """Compares type, channels and size of images with what the tokenizer takes.

    Raises:
        InputError: they do not fit.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise InputError(f"images must be a torch.Tensor on [-1, 1], got {kind}")
    if images.ndim != 4 or not len(images):
        raise InputError(
            "images must have the shape (batch, channels, height, width) and hold at least one, "
            f"got {tuple(images.shape)}"
        )
    if images.shape[1] != config.channels:
        raise InputError(f"images must have {config.channels} channels, got {images.shape[1]}")
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating point on [-1, 1], got {images.dtype}: bytes become it by "
            "images / 127.5 - 1"
        )
    code_maps_of(config.groups, *images.shape[-2:])


def given_images(images: Any, config: TokenizerConfig, weight: Tensor) -> Tensor:
    """A user's images on the device of `weight`, checked; waits for their device.

    What lies on [0, 1] may be images on [-1, 1], so that it is warned of and not refused.

    Raises:
        InputError: they do not fit, or a value is not finite or far outside [-1, 1].
    """
    check_images(images, config)
    lowest, highest = torch.stack(images.detach().aminmax()).tolist()
    if not (lowest >= -LARGEST_VALUE and highest <= LARGEST_VALUE):  # nor with NaN
        raise InputError(
            f"images must lie on [-1, 1], got values from {lowest:.4g} to {highest:.4g}: "
            "0 to 255 becomes it by images / 127.5 - 1, 0 to 1 by 2 * images - 1"
        )
    if 0 <= lowest < DARKEST_OF_UNIT_SCALE and highest > 0.5:
        logger.warning(
            "images lie between %.3g and %.3g; if they are on [0, 1], give 2 * images - 1",
            lowest,
            highest,
        )
    on_device: Tensor = images.to(weight.device)
    return on_device


def given_indices(indices: Any, config: TokenizerConfig, weight: Tensor) -> list[Tensor]:
    """A user's code indices of images of any size on the device of `weight`, checked.

    Raises:
        InputError: they do not fit.
    """
    _check_sequence(indices, "indices")
    if not indices or indices[0].ndim != 4 or not len(indices[0]):
        raise InputError("indices must be (batch, depth, height, width) tensors, a group each")
    coarsest = config.groups[0].downsampling
    height, width = indices[0].shape[2:]
    check_indices(indices, code_maps_of(config.groups, coarsest * height, coarsest * width))
    return [group.to(weight.device) for group in indices]


def _check_sequence(indices: Any, name: str) -> None:
    is_sequence = isinstance(indices, Sequence) and not isinstance(indices, str)
    for given in indices if is_sequence else [indices]:
        if not is_sequence or not isinstance(given, Tensor):
            raise InputError(
                f"{name} must be a list of int64 tensors (batch, depth, height, width), one per "
                f"group, got {'one with ' if is_sequence else ''}{type(given).__name__}"
            )


def check_indices(
    indices: Any,
    code_maps: Sequence[CodeMapConfig],
    name: str = "indices",
    lowest: int = 0,
) -> None:
    """Waits for the device and checks number, types, shapes and values.

    Raises:
        InputError: `indices`, called `name` in the message, do not fit the code maps, or a value
            is below `lowest`.
    """
    _check_sequence(indices, name)
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
                    f"{name}[{group}][:, {layer}] must lie in [{lowest}, {size}), "
                    f"got {int(wrong[0])}"
                )
