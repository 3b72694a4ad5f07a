"""The evidence lower bound as a training objective."""

from jaxtyping import Float
from torch import Tensor

from pipelines.config import TokenizerRecipe
from pipelines.training.losses.base import Loss
from tokenizer import TokenizerOutput
from tokenizer.objective import MIN_VARIANCE, gaussian_reconstruction


class Bound:
    """L = R + w·(Σ latent terms - Σ_l H(P_l)), in nats per image (HQ-VAE, arXiv 2401.00365).

    R = (D/2) log(SSE / D), the decoder's variance solved in closed form; at w = 1 L is the bound
    up to a constant. Or R = SSE / 2, a decoder of unit variance as in VQ-VAE (arXiv 1711.00937).
    Latent terms of quantizers without posterior are squared distances per value and count D/2
    each. SSE is averaged over the batch before its logarithm, also where micro-batches and
    processes share it.

    Args:
        recipe: Likelihood and weight.
        has_posterior: of the tokenizer; decides both where the recipe leaves them open.
    """

    def __init__(self, recipe: TokenizerRecipe, has_posterior: bool) -> None:
        likelihood = recipe.likelihood or ("closed_form" if has_posterior else "unit_variance")
        self.is_closed_form = likelihood == "closed_form"
        self.has_posterior = has_posterior
        usual_weight = 0.3 if has_posterior else 0.25
        weight = recipe.latent_weight
        self.latent_weight = usual_weight if weight is None else weight

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        output: TokenizerOutput,
        batch_error: Float[Tensor, ""] | None = None,
    ) -> Loss:
        """Minimizes L over D/2, whose gradient is of order one whatever the image size.

        `batch_error` is the SSE of all micro-batches and processes, where these images are a part
        of the batch: the mean of the parts' gradients is then that of the whole batch.
        """
        num_values = images[0].numel()
        squared_error = mean_squared_error(images, output)
        if not self.is_closed_form:
            reconstruction = squared_error / 2
        elif batch_error is None:
            reconstruction = gaussian_reconstruction(squared_error, num_values)
        else:  # the value of the whole batch, and this part's share of its gradient
            floor = MIN_VARIANCE * num_values
            share = num_values / 2 * (squared_error / batch_error.clamp_min(floor))
            share = share * (batch_error >= floor)
            reconstruction = gaussian_reconstruction(batch_error, num_values)
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
        return Loss(loss * (2 / num_values), logged)


def mean_squared_error(images: Tensor, output: TokenizerOutput) -> Float[Tensor, ""]:
    """SSE: mean over the images of ‖x - x̂‖²."""
    return (images - output.reconstructions).square().sum() / len(images)
