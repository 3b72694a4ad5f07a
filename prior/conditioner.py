"""The interface of what a prior is conditioned on."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenizer.storage.errors import InputError

VECTOR_AT_TIMES = "conditioner: a vector must be given always or never, by null as well"


class Condition(NamedTuple):
    """What the prior sees of a condition: either part, both or neither."""

    vector: Float[Tensor, "batch width"] | None = None
    """Added to the spatial transformer's input at every step."""
    tokens: Float[Tensor, "batch tokens width"] | None = None
    """Put before the steps in the spatial transformer's sequence, so that all steps see them."""

    def repeat_interleave(self, number: int) -> "Condition":
        """Each row so many times."""
        return Condition(*(p if p is None else p.repeat_interleave(number, 0) for p in self))


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Token embeddings of images: a sequence with one row per image."""

    embeddings: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"]
    """Where there is a token; what lies elsewhere is not used."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Any) -> "Tokens":
        return Tokens(self.embeddings[rows], self.mask[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tokens":
        """The same on a device."""
        return Tokens(
            self.embeddings.to(device, non_blocking=non_blocking),
            self.mask.to(device, non_blocking=non_blocking),
        )


class Conditioner(nn.Module, ABC):
    """Makes a `Condition` of opaque inputs: a tensor or sequence with one row per image.

    Rows must not depend on each other, and the parts that are given, the vector or tokens, must
    always be the same. Tokens have no positions but those that the conditioner adds. Weight decay
    spares the parameters that are not inside a submodule.
    """

    num_tokens: int = 0
    """Number of tokens of each image; a prior takes memory for them."""
    has_null: bool = False
    """Whether `null` is trained, so that guidance is possible and the inputs may be left out."""

    @abstractmethod
    def forward(self, inputs: Any) -> Condition:
        """The condition; in training mode some inputs may be hidden, so that `null` is trained."""

    def null(self, batch: int) -> Condition:
        """What stands for no condition, for `batch` images; only called if `has_null`."""
        raise NotImplementedError

    def check(self, inputs: Any, batch: int) -> None:
        """Checks the inputs of `batch` images before they are used; may wait for the device.

        Raises:
            InputError: they do not fit.
        """
        if inputs is None:
            raise InputError("condition must be given to this prior, got None")
        rows = len(inputs) if hasattr(inputs, "__len__") else repr(inputs)
        if rows != batch:
            raise InputError(f"condition must have one row for {batch} images, got {rows}")


def check_condition(condition: Condition, conditioner: Conditioner, batch: int, width: int) -> None:
    """Compares shapes, so that a part of another one is not broadcast.

    Raises:
        InputError: a conditioner gave vectors or tokens of another shape.
    """
    num_tokens = conditioner.num_tokens
    tokens_shape = (batch, num_tokens, width) if num_tokens else None
    allowed = {"vector": (None, (batch, width)), "tokens": (tokens_shape,)}
    for name, part in condition._asdict().items():
        shape = None if part is None else tuple(part.shape)
        if shape not in allowed[name]:
            raise InputError(
                f"conditioner: {name} must have shape {allowed[name][-1]}, got {shape}"
            )


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """The rows of several conditions.

    Raises:
        InputError: only some of them have a vector.
    """
    parts = []
    for tensors in zip(*conditions, strict=True):
        given = [tensor for tensor in tensors if tensor is not None]
        if given and len(given) < len(tensors):
            raise InputError(VECTOR_AT_TIMES)
        parts.append(torch.cat(given) if given else None)
    return Condition(*parts)
