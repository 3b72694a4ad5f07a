"""Autoregressive prior over code indices."""

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
