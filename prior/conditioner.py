"""What the prior is conditioned on: a class label, nothing, or whatever a user's module takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.config import PriorConfig
from prior.layers import random_embedding
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


class Unconditional(Conditioner):
    """No condition."""

    has_null = True

    def forward(self, inputs: None) -> Condition:
        """The empty condition.

        Raises:
            InputError: labels are given.
        """
        self.check(inputs, 0)
        return Condition()

    def null(self, batch: int) -> Condition:
        """The empty condition."""
        return Condition()

    def check(self, inputs: Any, batch: int) -> None:
        """Refuses labels.

        Raises:
            InputError: labels are given.
        """
        if inputs is not None:
            raise InputError("labels must be None for an unconditional prior, got labels")


class ClassConditioner(Conditioner):
    """One vector per class label; label `num_classes` is the null class.

    Args:
        num_classes: Number of classes.
        width: Channels of the vector.
        label_dropout: Share of labels that is hidden in training mode.
    """

    def __init__(self, num_classes: int, width: int, label_dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.has_null = label_dropout > 0
        self.embedding = random_embedding(num_classes + 1, width)

    def forward(self, inputs: Int[Tensor, " batch"] | None) -> Condition:
        """The labels' vectors; values are not checked.

        Raises:
            InputError: there are no labels.
        """
        if inputs is None:
            raise InputError("labels must be given to a class-conditional prior, got None")
        if self.training:
            is_hidden = torch.rand(inputs.shape, device=inputs.device) < self.label_dropout
            inputs = inputs.masked_fill(is_hidden, self.num_classes)
        return Condition(nn.functional.embedding(inputs, self.embedding))

    def null(self, batch: int) -> Condition:
        """The vector of the null class."""
        return Condition(self.embedding[-1].expand(batch, -1))

    def check(self, inputs: Any, batch: int) -> None:
        """Checks labels; waits for the device.

        Raises:
            InputError: labels are missing, of another number than `batch`, not int64 or out of
                range.
        """
        if not isinstance(inputs, Tensor):
            found = type(inputs).__name__
            raise InputError(f"labels must be given as a tensor to this prior, got {found}")
        if tuple(inputs.shape) != (batch,):
            raise InputError(f"labels must have shape ({batch},), got {tuple(inputs.shape)}")
        if inputs.dtype != torch.int64:
            raise InputError(f"labels must be int64, got {inputs.dtype}")
        wrong = inputs[(inputs < 0) | (inputs >= self.num_classes)]
        if len(wrong):
            raise InputError(f"labels must lie in [0, {self.num_classes}), got {int(wrong[0])}")


def make_conditioner(config: PriorConfig, custom: Conditioner | None) -> Conditioner:
    """The one that `config` names: the user's, or one of its number of classes.

    Raises:
        InputError: the user's is missing, or the config does not name it.
    """
    if config.has_custom_conditioner:
        if custom is None:
            raise InputError(
                "conditioner must be given to this prior, which was built with one: "
                "Prior.from_pretrained(folder, conditioner=...)"
            )
        return custom
    if custom is not None:
        raise InputError(
            "conditioner must be None unless config.has_custom_conditioner is True, got "
            f"{type(custom).__name__}"
        )
    if not config.num_classes:
        return Unconditional()
    network = config.network
    return ClassConditioner(config.num_classes, network.width, network.label_dropout)


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
