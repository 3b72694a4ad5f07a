"""Quantizers: latents to code indices and code vectors."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from tokenizer.quantizers.base import GroupConfig, Quantizer, QuantizerOutput
from tokenizer.quantizers.fsq import FiniteScalarQuantizer, FiniteScalarQuantizerConfig
from tokenizer.quantizers.nearest import NearestQuantizer, NearestQuantizerConfig
from tokenizer.quantizers.stochastic import StochasticQuantizer, StochasticQuantizerConfig
from tokenizer.storage.configs import StrictConfig

__all__ = [
    "QUANTIZERS",
    "BuildQuantizer",
    "CustomQuantizerConfig",
    "FiniteScalarQuantizer",
    "FiniteScalarQuantizerConfig",
    "GroupConfig",
    "NearestQuantizer",
    "NearestQuantizerConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "StochasticQuantizer",
    "StochasticQuantizerConfig",
]


class CustomQuantizerConfig(StrictConfig):
    """A quantizer from outside the package; what builds it is given in Python."""

    kind: Literal["custom"] = "custom"
    name: str
    """What it is called, for people."""


QuantizerConfig = Annotated[
    StochasticQuantizerConfig
    | NearestQuantizerConfig
    | FiniteScalarQuantizerConfig
    | CustomQuantizerConfig,
    Field(discriminator="kind"),
]

BuildQuantizer = Callable[[GroupConfig], Quantizer]
"""What builds the quantizer of a group: a class from outside the package, say."""

QUANTIZERS: dict[type[StrictConfig], Any] = {
    StochasticQuantizerConfig: StochasticQuantizer,
    NearestQuantizerConfig: NearestQuantizer,
    FiniteScalarQuantizerConfig: FiniteScalarQuantizer,
}
"""By the class of a config, what builds a quantizer from a `GroupConfig` and it."""
