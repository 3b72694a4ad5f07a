"""What the loop minimizes, and what a loss of stage one is."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokenizer import TokenizerOutput


class Loss(NamedTuple):
    """What a stage computes on one micro-batch for one network."""

    minimized: Tensor
    """Scalar whose gradient is followed."""
    terms: dict[str, Tensor]
    """Scalars and vectors to log; `loss`, if it is not among them, is `minimized`."""


@runtime_checkable
class TokenizerLoss(Protocol):
    """Weighs the terms of a tokenizer's output; a module if it has networks of its own."""

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], output: TokenizerOutput
    ) -> Loss:
        """The loss of some images on [-1, 1]."""
