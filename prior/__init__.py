"""Autoregressive prior over code indices."""

from prior.config import PriorConfig, PriorNetworkConfig
from prior.incremental_decoder import PriorCache
from prior.ordering import CodeOrdering
from prior.sampling import Sampler, sample, sample_generators
from prior.transformer import Prior, PriorOutput

__all__ = [
    "CodeOrdering",
    "Prior",
    "PriorCache",
    "PriorConfig",
    "PriorNetworkConfig",
    "PriorOutput",
    "Sampler",
    "sample",
    "sample_generators",
]
