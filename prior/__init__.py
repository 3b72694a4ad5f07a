"""Autoregressive prior over code indices."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior.conditioner import Condition, Conditioner, Tokens
    from prior.conditioners import (
        AttributeConditioner,
        ClassConditioner,
        EmbeddingConditioner,
        Unconditional,
    )
    from prior.config import (
        AttributeConditionConfig,
        AttributeConfig,
        EmbeddingConditionConfig,
        PriorConfig,
        PriorNetworkConfig,
        TextEncoderConfig,
    )
    from prior.incremental_decoder import IncrementalDecoder
    from prior.ordering import CodeOrdering
    from prior.sampling import Sampler, sample, sample_generators
    from prior.transformer import Prior, PriorOutput

__all__ = [
    "AttributeConditionConfig",
    "AttributeConditioner",
    "AttributeConfig",
    "ClassConditioner",
    "CodeOrdering",
    "Condition",
    "Conditioner",
    "EmbeddingConditionConfig",
    "EmbeddingConditioner",
    "IncrementalDecoder",
    "Prior",
    "PriorConfig",
    "PriorNetworkConfig",
    "PriorOutput",
    "Sampler",
    "TextEncoderConfig",
    "Tokens",
    "Unconditional",
    "sample",
    "sample_generators",
]

_MODULES = {
    "AttributeConditionConfig": "config",
    "AttributeConditioner": "conditioners",
    "AttributeConfig": "config",
    "ClassConditioner": "conditioners",
    "CodeOrdering": "ordering",
    "Condition": "conditioner",
    "Conditioner": "conditioner",
    "EmbeddingConditionConfig": "config",
    "EmbeddingConditioner": "conditioners",
    "IncrementalDecoder": "incremental_decoder",
    "Prior": "transformer",
    "PriorConfig": "config",
    "PriorNetworkConfig": "config",
    "PriorOutput": "transformer",
    "Sampler": "sampling",
    "TextEncoderConfig": "config",
    "Tokens": "conditioner",
    "Unconditional": "conditioners",
    "sample": "sampling",
    "sample_generators": "sampling",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command line is read without torch, which takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
