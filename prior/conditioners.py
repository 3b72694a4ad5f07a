"""The built-in conditioners: no condition, a class, embeddings of any encoder, attributes."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from prior.conditioner import Condition, Conditioner, Tokens
from prior.config import AttributeConditionConfig, EmbeddingConditionConfig, PriorConfig
from prior.layers import random_embedding
from tokenizer.storage.errors import InputError


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


class EmbeddingConditioner(Conditioner):
    """Vectors or tokens of any encoder, projected to the prior's width.

    A vector is added to all steps. Tokens stand before them, each with a learned vector of its
    place; where there is no token, another learned vector stands (as in DALL-E, arXiv 2102.12092),
    so that no mask is needed in attention. The mean of the tokens is added to all steps, too.

    Embeddings are standardized per channel first; see `standardize_by`.

    Args:
        config: Number of channels and tokens.
        width: Channels of the prior.
        label_dropout: Share of images whose embeddings are hidden in training mode.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: EmbeddingConditionConfig, width: int, label_dropout: float) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.num_tokens
        self.label_dropout = label_dropout
        self.has_null = label_dropout > 0
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("scale", torch.ones(config.dim))
        self.to_vector = nn.Linear(config.dim, width)
        self.unknown = random_embedding(1, width)
        self.to_token = nn.Linear(config.dim, width) if self.num_tokens else None
        if self.num_tokens:
            self.place = random_embedding(self.num_tokens, width)
            self.padding = random_embedding(self.num_tokens, width)
            self.unknown_tokens = random_embedding(self.num_tokens, width)

    def standardize_by(self, embeddings: Float[Tensor, "rows dim"]) -> None:
        """Takes mean and standard deviation of each channel from some of the training data.

        Encoders give numbers of very different sizes. A channel that is constant stays so.
        """
        variance, mean = torch.var_mean(embeddings.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(variance > 0, variance, 1).rsqrt())

    def forward(self, inputs: Float[Tensor, "batch dim"] | Tokens) -> Condition:
        """The embeddings' vectors and tokens; they are not checked."""
        is_hidden = None
        if self.training:
            is_hidden = torch.rand(len(inputs), 1, device=self.mean.device) < self.label_dropout
        if isinstance(inputs, Tensor):
            vector, tokens = self.to_vector(self._standardized(inputs)), None
        else:
            assert self.to_token is not None
            mask = inputs.mask.unsqueeze(2)
            # What is masked may be NaN, which a product with zero would keep.
            embeddings = self._standardized(inputs.embeddings.masked_fill(~mask, 0))
            number = mask.sum(1).clamp_min(1)
            vector = self.to_vector((embeddings * mask).sum(1) / number)
            tokens = torch.where(mask, self.to_token(embeddings) + self.place, self.padding)
        if is_hidden is not None:
            vector = torch.where(is_hidden, self.unknown, vector)
            if tokens is not None:
                tokens = torch.where(is_hidden.unsqueeze(2), self.unknown_tokens, tokens)
        return Condition(vector, tokens)

    def _standardized(self, embeddings: Tensor) -> Tensor:
        return (embeddings.to(self.mean.dtype) - self.mean) * self.scale

    def null(self, batch: int) -> Condition:
        """Learned vectors that stand for no embeddings."""
        tokens = self.unknown_tokens.expand(batch, -1, -1) if self.num_tokens else None
        return Condition(self.unknown.expand(batch, -1), tokens)

    def check(self, inputs: Any, batch: int) -> None:
        """Checks shapes and values; waits for the device.

        Raises:
            InputError: the inputs are missing, of another kind, number or width, or not finite.
        """
        super().check(inputs, batch)
        kind = Tokens if self.num_tokens else Tensor
        if not isinstance(inputs, kind):
            raise InputError(
                f"condition must be given as {kind.__name__} to this prior, got "
                f"{type(inputs).__name__}"
            )
        embeddings = inputs.embeddings if isinstance(inputs, Tokens) else inputs
        shape = (self.num_tokens, self.config.dim) if self.num_tokens else (self.config.dim,)
        if tuple(embeddings.shape[1:]) != shape:
            raise InputError(
                f"condition must have shape {(batch, *shape)}, got {tuple(embeddings.shape)}"
            )
        if not embeddings.is_floating_point():
            raise InputError(f"condition must be floating-point, got {embeddings.dtype}")
        is_used = inputs.mask.unsqueeze(2) if isinstance(inputs, Tokens) else True
        if not bool((embeddings.isfinite() | ~torch.as_tensor(is_used)).all()):
            raise InputError("condition must be finite, got NaN or infinity")


class AttributeConditioner(Conditioner):
    """Several labels at once: one vector, the sum over what is known of an image.

    Inputs are (B, values of all attributes) in int8: 1 where an image has a value, 0 where not, -1
    at all values of an attribute that is left open. In training mode a share `label_dropout` of
    the images loses all attributes, and of the others each attribute is left open with the same
    probability. The null condition is that all are open.

    Args:
        config: Names and values.
        width: Channels of the vector.
        label_dropout: Share that is hidden in training mode.
    """

    attribute: Tensor
    first_value: Tensor

    def __init__(self, config: AttributeConditionConfig, width: int, label_dropout: float) -> None:
        super().__init__()
        self.config = config
        self.label_dropout = label_dropout
        self.has_null = label_dropout > 0
        self.embedding = random_embedding(config.num_values, width)
        self.unknown = random_embedding(len(config.attributes), width)
        numbers = [n for n, own in enumerate(config.attributes) for _ in own.values]
        first_values = [numbers.index(number) for number in range(len(config.attributes))]
        self.register_buffer("attribute", torch.tensor(numbers), persistent=False)
        self.register_buffer("first_value", torch.tensor(first_values), persistent=False)

    def forward(self, inputs: Int8[Tensor, "batch values"]) -> Condition:
        """The sum of the values' vectors; they are not checked."""
        is_open = inputs[:, self.first_value] < 0  # (B, attributes)
        if self.training:
            shares = torch.rand(len(inputs), 1 + is_open.shape[1], device=inputs.device)
            is_hidden = shares < self.label_dropout
            is_open = is_open | is_hidden[:, 1:] | is_hidden[:, :1]
        has_value = (inputs > 0) & ~is_open[:, self.attribute]
        dtype = self.embedding.dtype
        vector = has_value.to(dtype) @ self.embedding + is_open.to(dtype) @ self.unknown
        return Condition(vector / math.sqrt(is_open.shape[1]))

    def null(self, batch: int) -> Condition:
        """What stands for attributes that are all open."""
        vector = self.unknown.sum(0) / math.sqrt(len(self.unknown))
        return Condition(vector.expand(batch, -1))

    def check(self, inputs: Any, batch: int) -> None:
        """Checks shape and values; waits for the device.

        Raises:
            InputError: the inputs are missing, of another number, width or type, out of range, or
                an attribute is open at some of its values only.
        """
        super().check(inputs, batch)
        shape = (batch, self.config.num_values)
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.int8:
            found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InputError(f"condition must be an int8 tensor to this prior, got {found}")
        if tuple(inputs.shape) != shape:
            raise InputError(f"condition must have shape {shape}, got {tuple(inputs.shape)}")
        first = inputs.to(self.first_value.device)[:, self.first_value][:, self.attribute]
        inputs = inputs.to(first.device)
        if bool(((inputs < -1) | (inputs > 1) | ((inputs < 0) != (first < 0))).any()):
            raise InputError(
                "condition must be 0 or 1, or -1 at all values of an attribute, got others"
            )


def make_conditioner(config: PriorConfig, custom: Conditioner | None) -> Conditioner:
    """The one that `config` names: the user's, or a built-in one.

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
    network = config.network
    if isinstance(config.condition, EmbeddingConditionConfig):
        return EmbeddingConditioner(config.condition, network.width, network.label_dropout)
    if isinstance(config.condition, AttributeConditionConfig):
        return AttributeConditioner(config.condition, network.width, network.label_dropout)
    if not config.num_classes:
        return Unconditional()
    return ClassConditioner(config.num_classes, network.width, network.label_dropout)
