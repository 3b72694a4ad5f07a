"""Autoregressive prior over code indices."""

from prior.conditioner import ClassConditioner, Condition, Conditioner, Unconditional
from prior.config import PriorConfig, PriorNetworkConfig
from prior.incremental_decoder import IncrementalDecoder
from prior.ordering import CodeOrdering
from prior.sampling import Sampler, sample, sample_generators
from prior.transformer import Prior, PriorOutput

__all__ = [
    "ClassConditioner",
    "CodeOrdering",
    "Condition",
    "Conditioner",
    "IncrementalDecoder",
    "Prior",
    "PriorConfig",
    "PriorNetworkConfig",
    "PriorOutput",
    "Sampler",
    "Unconditional",
    "sample",
    "sample_generators",
]
