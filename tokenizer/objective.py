"""Terms of the objective and the evidence lower bound (HQ-VAE, arXiv 2401.00365)."""

import math
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class TokenizerOutput(NamedTuple):
    """What a training objective is made of; means over the batch, in nats per image.

    A NamedTuple, not a dataclass: Accelerate casts tuples back to float32 under mixed precision.
    """

    reconstructions: Float[Tensor, "batch channels height width"]
    """x̂ on [-1, 1]."""
    indices: list[Int[Tensor, "batch _ _ _"]]
    """Code indices, coarse to fine."""
    layer_entropy: Float[Tensor, " layers"]
    """H(P_l) of each layer; zeros without a posterior."""
    latent_terms: dict[str, Float[Tensor, ""]]
    """The quantizers' terms, summed over the groups: `QuantizerOutput.latent_terms`."""


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
