"""Terms of the objective and the evidence lower bound (HQ-VAE, arXiv 2401.00365)."""

import math
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tokenizer.code_prior import CodeTerms
from tokenizer.storage.errors import InputError


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
    code_terms: CodeTerms | None = None
    """Of the prior inside the tokenizer, in training."""


MIN_VARIANCE = 1e-12
"""Smallest σ² of the decoder; a byte's rounding error alone has 5e-6."""
BoundCodes = Literal["posterior", "nearest"]
"""Approximate posterior of a bound: the quantizer's, or a point mass at the nearest codes."""


class EvidenceLowerBound(NamedTuple):
    """An upper bound of -log p(image), image by image."""

    nats: Float64[Tensor, " batch"]
    """Of the 8-bit image: the density is integrated over bins of 2/255."""
    bits_per_dim: Float64[Tensor, " batch"]
    """nats / (C·H·W·ln 2)."""
    squared_errors: Float[Tensor, " batch"]
    """‖x - x̂‖², images on [-1, 1]."""


def check_bound(decoder_variance: object, codes: object, has_posterior: bool) -> None:
    """Checks what a bound is asked for.

    Raises:
        InputError: one line about it.
    """
    if codes not in get_args(BoundCodes):
        raise InputError(f"codes must be one of {', '.join(get_args(BoundCodes))}, got {codes!r}")
    if codes == "posterior" and not has_posterior:
        raise InputError("tokenizer.quantizer must have a posterior for this, such as stochastic")
    if decoder_variance is None:
        return
    if not isinstance(decoder_variance, Real) or not 0 < float(decoder_variance) < math.inf:
        raise InputError(f"decoder_variance must be a finite number > 0, got {decoder_variance!r}")


def gaussian_reconstruction(squared_error: Float[Tensor, ""], num_values: int) -> Float[Tensor, ""]:
    """(D/2) log(SSE / D): -log N(x; x̂, σ²) with σ² = SSE / D solved in closed form.

    AR-ELBO, arXiv 2102.08663. `squared_error` is averaged over the batch before the logarithm;
    σ² is at least `MIN_VARIANCE`, so that exact reconstructions have a finite loss.
    """
    return num_values / 2 * (squared_error / num_values).clamp_min(MIN_VARIANCE).log()


def discretized_code_length(
    images: Float[Tensor, "batch channels height width"],
    reconstructions: Float[Tensor, "batch channels height width"],
    decoder_variance: float,
) -> Float64[Tensor, " batch"]:
    """-log P(x | Z) of 8-bit images in nats: N(x̂, σ²) integrated over bins of width 2/255.

    The outermost bins, of bytes 0 and 255, reach to infinity: a distribution over all bytes.
    """
    scale = math.sqrt(decoder_variance)
    images, distance = images.double(), images.double() - reconstructions.double()
    lower = torch.where(images <= -1 + 1 / 255, -math.inf, (distance - 1 / 255) / scale)
    upper = torch.where(images >= 1 - 1 / 255, math.inf, (distance + 1 / 255) / scale)
    # On the left side of the mean, where the logarithm of Φ is exact: Φ(-x) = 1 - Φ(x).
    is_right = lower + upper > 0
    lower, upper = torch.where(is_right, -upper, lower), torch.where(is_right, -lower, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    # log(Φ(upper) - Φ(lower)); the difference of two equal numbers is that of a far tail.
    log_mass = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
    nats: Tensor = -log_mass.flatten(1).sum(1)
    return nats


def bound_of(
    images: Float[Tensor, "batch channels height width"],
    reconstructions: Float[Tensor, "batch channels height width"],
    code_nats: Float64[Tensor, " batch"],
    decoder_variance: float | None,
) -> EvidenceLowerBound:
    """The bound from the codes' part of it, -log p(codes) minus what their posterior gives back.

    `decoder_variance` None is SSE / D of these images.
    """
    squared_errors = (images - reconstructions).square().flatten(1).sum(1)
    num_values = images[0].numel()
    if decoder_variance is None:
        mean = squared_errors.double().mean().item() / num_values
        decoder_variance = max(mean, MIN_VARIANCE)
    nats = discretized_code_length(images, reconstructions, decoder_variance) + code_nats
    return EvidenceLowerBound(nats, nats / (num_values * math.log(2)), squared_errors)
