"""The evidence lower bound, its terms, and the temperature schedule (HQ-VAE, arXiv 2401.00365)."""

import math
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.config import StochasticQuantizerConfig


class TokenizerOutput(NamedTuple):
    """What training minimizes, and its terms in nats per image, batch means.

    A NamedTuple, not a dataclass: Accelerate casts tuples back to float32 under mixed precision.
    """

    loss: Float[Tensor, ""]
    """reconstruction + latent_weight · (quantization_error - posterior_entropy) + commitment."""
    reconstruction: Float[Tensor, ""]
    """(D/2) log(SSE / D); for the baselines, SSE / 2 (a Gaussian of unit variance)."""
    quantization_error: Float[Tensor, ""]
    """Σ_g ‖Ẑ^g - Σ_l Z_l‖² / (2 Σ_l s_l²)."""
    posterior_entropy: Float[Tensor, ""]
    """Σ_l H(P_l)."""
    commitment: Float[Tensor, ""]
    """Baselines only: (D/2) · weight · mean squared distance; otherwise zero."""
    layer_entropy: Float[Tensor, " layers"]
    """H(P_l) of each layer."""
    squared_error: Float[Tensor, ""]
    """SSE: batch mean of ‖x - x̂‖², images on [-1, 1]."""
    reconstructions: Float[Tensor, "batch channels height width"]
    """x̂ on [-1, 1]."""
    indices: list[Int[Tensor, "batch _ _ _"]]
    """Code indices, coarse to fine."""


class EvidenceLowerBound(NamedTuple):
    """An upper bound of -log p(image), image by image."""

    nats: Float[Tensor, " batch"]
    """For the 8-bit image: the density is integrated over bins of 2/255."""
    bits_per_dim: Float[Tensor, " batch"]
    """nats / (C·H·W·ln 2)."""
    squared_errors: Float[Tensor, " batch"]
    """‖x - x̂‖², images on [-1, 1]."""


def gaussian_reconstruction(squared_error: Float[Tensor, ""], num_values: int) -> Float[Tensor, ""]:
    """(D/2) log(SSE / D): -log N(x; x̂, σ²) with σ² = SSE / D solved in closed form.

    AR-ELBO, arXiv 2102.08663. `squared_error` is averaged over the batch before the logarithm.
    """
    return num_values / 2 * (squared_error / num_values).log()


def gaussian_code_length(
    squared_errors: Float[Tensor, " batch"], num_values: int, decoder_variance: float
) -> Float[Tensor, " batch"]:
    """-log P(x | Z) of the 8-bit image in nats: N(x; x̂, σ²) times the bin width 2/255."""
    normalizer = 0.5 * math.log(2 * math.pi * decoder_variance) - math.log(2 / 255)
    return squared_errors / (2 * decoder_variance) + num_values * normalizer


def temperature_at(config: StochasticQuantizerConfig, step: int, total_steps: int) -> float:
    """The initial temperature, held for a share of the steps, then exponentially to the final one.

    A high one gives gradients of low variance; only the end has to resemble hard codes.
    """
    hold = config.temperature_hold
    progress = step / max(total_steps - 1, 1)
    fallen = min(max((progress - hold) / (1 - hold), 0.0), 1.0)
    ratio = config.final_temperature / config.initial_temperature
    return float(config.initial_temperature * ratio**fallen)
