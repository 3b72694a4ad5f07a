"""Quantizers: latents to code indices and code vectors."""

from collections.abc import Callable
from typing import Any

from tokenizer.config import (
    CustomQuantizerConfig,
    FiniteScalarQuantizerConfig,
    GroupConfig,
    NearestQuantizerConfig,
    StochasticQuantizerConfig,
    TokenizerConfig,
)
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.fsq import FiniteScalarQuantizer
from tokenizer.quantizers.nearest import NearestQuantizer
from tokenizer.quantizers.stochastic import StochasticQuantizer
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.errors import InputError

__all__ = [
    "QUANTIZERS",
    "BuildQuantizer",
    "FiniteScalarQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "StochasticQuantizer",
    "build_quantizer",
]


BuildQuantizer = Callable[[GroupConfig], Quantizer]
"""What builds the quantizer of a group: a class from outside the package, say."""

QUANTIZERS: dict[type[StrictConfig], Any] = {
    StochasticQuantizerConfig: StochasticQuantizer,
    NearestQuantizerConfig: NearestQuantizer,
    FiniteScalarQuantizerConfig: FiniteScalarQuantizer,
}
"""By the class of a config, what builds a quantizer from a `GroupConfig` and it."""


def build_quantizer(config: TokenizerConfig) -> BuildQuantizer:
    """What builds the quantizers that a config describes.

    Raises:
        InputError: they are from outside the package.
    """
    if isinstance(config.quantizer, CustomQuantizerConfig):
        raise InputError(
            f"tokenizer.quantizer {config.quantizer.name!r} is from outside the package: give what "
            "builds it, as in Tokenizer.from_pretrained(folder, quantizer=...)"
        )
    build = QUANTIZERS[type(config.quantizer)]
    return lambda group: build(group, config.quantizer)
