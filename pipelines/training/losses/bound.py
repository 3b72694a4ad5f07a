"""The evidence lower bound as a training objective."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.config import TokenizerRecipe
from pipelines.training.losses.base import Loss
from pipelines.training.losses.perceptual import PerceptualDistance
from tokenizer import TokenizerOutput
from tokenizer.objective import MIN_VARIANCE, gaussian_reconstruction


class Energy(NamedTuple):
    """E = SSE + v·D·P, a mean over the images."""

    total: Float[Tensor, ""]
    """E."""
    squared_error: Float[Tensor, ""]
    """SSE."""
    perceptual: Float[Tensor, ""]
    """P."""


class Bound:
    """L = R + w·(Σ latent terms - Σ_l H(P_l)), in nats per image (HQ-VAE, arXiv 2401.00365).

    R = (D/2) log(E / D), the decoder's variance solved in closed form; at w = 1 L is the bound
    up to a constant. Or R = E / 2, a decoder of unit variance as in VQ-VAE (arXiv 1711.00937).
    The energy E is SSE, or SSE + v·D·P with a perceptual distance P of weight v, and is averaged
    over the batch before its logarithm, also where micro-batches and processes share it.
    Latent terms of quantizers without posterior are squared distances per value and count D/2
    each.

    Args:
        recipe: Likelihood and weights.
        has_posterior: of the tokenizer; decides both where the recipe leaves them open.
        perceptual: P, on the images' device; None where its weight is 0.
    """

    def __init__(
        self,
        recipe: TokenizerRecipe,
        has_posterior: bool,
        perceptual: PerceptualDistance | None = None,
    ) -> None:
        likelihood = recipe.likelihood or ("closed_form" if has_posterior else "unit_variance")
        self.is_closed_form = likelihood == "closed_form"
        self.has_posterior = has_posterior
        usual_weight = 0.3 if has_posterior else 0.25
        weight = recipe.latent_weight
        self.latent_weight = usual_weight if weight is None else weight
        self.perceptual = perceptual
        self.perceptual_weight = recipe.perceptual.weight

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        output: TokenizerOutput,
        batch_energy: Float[Tensor, ""] | None = None,
        energy: Energy | None = None,
    ) -> Loss:
        """Minimizes L over D/2, whose gradient is of order one whatever the image size.

        `batch_energy` is E of all micro-batches and processes, where these images are a part
        of the batch: the mean of the parts' gradients is then that of the whole batch. `energy` is
        that of these images, if it has been computed.
        """
        num_values = images[0].numel()
        total, squared_error, perceptual = energy or self.energy(images, output)
        if not self.is_closed_form:
            reconstruction = total / 2
        elif batch_energy is None:
            reconstruction = gaussian_reconstruction(total, num_values)
        else:  # the value of the whole batch, and this part's share of its gradient
            floor = MIN_VARIANCE * num_values
            share = num_values / 2 * (total / batch_energy.clamp_min(floor))
            share = share * (batch_energy >= floor)
            reconstruction = gaussian_reconstruction(batch_energy, num_values)
            reconstruction = reconstruction + share - share.detach()
        entropy = output.layer_entropy.sum()
        latents, weight, terms = -entropy, self.latent_weight, output.latent_terms
        if not self.has_posterior:
            terms = {name: num_values / 2 * weight * term for name, term in terms.items()}
            weight = 1.0
        for term in terms.values():
            latents = latents + term
        loss = reconstruction + weight * latents
        logged = {
            "loss": loss,
            "reconstruction": reconstruction,
            **terms,
            "posterior_entropy": entropy,
            "layer_entropy": output.layer_entropy,
            "rmse": (squared_error / num_values).sqrt() / 2,
        }
        if self.perceptual is not None:
            logged["perceptual"] = perceptual
        return Loss(loss * (2 / num_values), logged)

    def energy(
        self, images: Float[Tensor, "batch channels height width"], output: TokenizerOutput
    ) -> Energy:
        """What the logarithm is taken of, or half of it, and its parts."""
        squared_error = mean_squared_error(images, output)
        if self.perceptual is None:
            return Energy(squared_error, squared_error, torch.zeros_like(squared_error))
        perceptual = self.perceptual(images, output.reconstructions)
        weight = self.perceptual_weight * images[0].numel()
        return Energy(squared_error + weight * perceptual, squared_error, perceptual)


def mean_squared_error(images: Tensor, output: TokenizerOutput) -> Float[Tensor, ""]:
    """SSE: mean over the images of ‖x - x̂‖²."""
    return (images - output.reconstructions).square().sum() / len(images)
