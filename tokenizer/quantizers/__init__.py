"""Quantizers: latents to code indices and code vectors."""

from collections.abc import Callable
from typing import Any

from tokenizer.config import (
    FiniteScalarQuantizerConfig,
    GroupConfig,
    NearestQuantizerConfig,
    StochasticQuantizerConfig,
)
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.fsq import FiniteScalarQuantizer
from tokenizer.quantizers.nearest import NearestQuantizer
from tokenizer.quantizers.stochastic import StochasticQuantizer
from tokenizer.storage.configs import StrictConfig

__all__ = [
    "QUANTIZERS",
    "BuildQuantizer",
    "FiniteScalarQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "StochasticQuantizer",
]


BuildQuantizer = Callable[[GroupConfig], Quantizer]
"""What builds the quantizer of a group: a class from outside the package, say."""

QUANTIZERS: dict[type[StrictConfig], Any] = {
    StochasticQuantizerConfig: StochasticQuantizer,
    NearestQuantizerConfig: NearestQuantizer,
    FiniteScalarQuantizerConfig: FiniteScalarQuantizer,
}
"""By the class of a config, what builds a quantizer from a `GroupConfig` and it."""
