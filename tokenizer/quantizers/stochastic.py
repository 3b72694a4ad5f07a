"""Stochastic quantization (SQ-VAE, arXiv 2205.07547) of one group (HQ-VAE, arXiv 2401.00365)."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.config import GroupConfig, StochasticQuantizerConfig
from tokenizer.quantizers.base import (
    CrossEntropy,
    Mode,
    QuantizerOutput,
    at_least_float32,
    full_precision,
)
from tokenizer.quantizers.codebooks import CodebookQuantizer
from tokenizer.quantizers.cross_entropy import blocked_cross_entropy
from tokenizer.quantizers.mixture import centered, proximity, stochastic_quantization
from tokenizer.storage.errors import InputError

LOG_VARIANCE_BOUNDS = (-40.0, 40.0)
"""Within them s⁴ and 1 / s⁴, which gradients contain, are finite in float32."""


class StochasticQuantizer(CodebookQuantizer):
    """One layer is SQ-VAE; several are RSQ-VAE (HQ-VAE, section 4).

    Latent terms: the quantization error ‖Ẑ - Σ_l Z_l‖² / (2 Σ_l s_l²), in nats.
    """

    has_posterior = True

    def __init__(self, group: GroupConfig, config: StochasticQuantizerConfig) -> None:
        super().__init__(group)
        self.config = config
        self.codebooks = nn.ParameterList(
            torch.randn(size, group.code_dim) for size in group.codebook_sizes[: self.num_codebooks]
        )
        self.log_variances = nn.Parameter(torch.zeros(group.num_layers))

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Code vectors of a layer."""
        codebook: Tensor = self.codebooks[layer % self.num_codebooks]
        return codebook

    def variances(self) -> Float[Tensor, " layers"]:
        """s² of each layer; log s² counts as within `LOG_VARIANCE_BOUNDS`."""
        return at_least_float32(self.log_variances).clamp(*LOG_VARIANCE_BOUNDS).exp()

    def learned_roles(self) -> dict[str, Literal["codebook", "variance"]]:
        """Codebooks, and the logarithms of the variances."""
        names = [name for name, _ in self.named_parameters()]
        return {name: "variance" if name == "log_variances" else "codebook" for name in names}

    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantizes `latents`; `temperature` > 0 matters to the mode "mixture" alone."""
        batch, _, height, width = latents.shape
        with full_precision(latents.device):
            variances = self.variances()
            # Contiguous, so that what follows is the same to the last bit as from indices.
            residual = at_least_float32(latents).movedim(1, -1).contiguous().flatten(0, 2)  # (N, D)
            quantized = torch.zeros_like(residual)
            indices, entropies = [], []
            for layer in range(self.num_layers):
                draw = stochastic_quantization(
                    residual,
                    at_least_float32(self.codebook(layer)),
                    variances[layer],
                    temperature,
                    mode,
                    generator,
                )
                quantized = quantized + draw.quantized
                residual = residual - draw.quantized  # not detached
                indices.append(draw.indices.view(batch, height, width))
                entropies.append(draw.posterior_entropy.view(batch, -1).sum(1))
            error = residual.square().reshape(batch, -1).sum(1) / (2 * variances.sum())
        return QuantizerOutput(
            quantized.view(batch, height, width, -1).movedim(-1, 1),
            torch.stack(indices, 1),
            torch.stack(entropies, 1),
            {"quantization_error": error},
        )

    def log_posterior(
        self, layer: int, residual: Float[Tensor, "positions dim"]
    ) -> Float[Tensor, "positions codes"]:
        """Logarithm of P_l(k | residual)."""
        with full_precision(residual.device):
            vectors = at_least_float32(self.codebook(layer))
            latents, codebook, _ = centered(at_least_float32(residual), vectors)
            return proximity(latents, codebook, 1 / self.variances()[layer]).log_softmax(1)

    def cross_entropy(
        self,
        layer: int,
        residual: Float[Tensor, "positions dim"],
        features: Float[Tensor, "positions width"],
        head: nn.Linear,
    ) -> CrossEntropy:
        """Σ CE(P_l, p) over the positions, where p = softmax(head(features))."""
        with full_precision(residual.device):
            vectors = at_least_float32(self.codebook(layer))
            latents, codebook, _ = centered(at_least_float32(residual), vectors)
            prior = (features.to(latents), head.weight.to(latents), head.bias.to(latents))
            return blocked_cross_entropy(latents, codebook, self.variances()[layer], *prior)

    def log_posteriors(
        self,
        latents: Float[Tensor, "batch dim height width"],
        indices: Int[Tensor, "batch depth height width"],
    ) -> list[Float[Tensor, "batch height width codes"]]:
        """Logarithm of P_l(k | residual of layer l), given the codes of the layers before."""
        with full_precision(latents.device):
            residual = at_least_float32(latents).movedim(1, -1)  # (B, H, W, D)
            log_posteriors = []
            for layer in range(self.num_layers):
                log_posterior = self.log_posterior(layer, residual.flatten(0, 2))
                log_posteriors.append(log_posterior.view(*residual.shape[:3], -1))
                vectors = at_least_float32(self.codebook(layer))
                residual = residual - vectors[indices[:, layer]]
        return log_posteriors

    def initialize_layer(
        self, layer: int, inputs: Float[Tensor, "positions dim"], generator: torch.Generator
    ) -> None:
        """Code vectors = random inputs plus noise, s² ∝ the inputs' variance.

        Raises:
            InputError: all inputs are equal, or one is not finite.
        """
        variance = inputs.var(0, correction=0).mean()
        if not variance > 0:
            raise InputError(
                f"images: to start from them, what layer {layer + 1} of a group gets must vary, "
                f"got variance {variance.item()}"
            )
        if layer < self.num_codebooks:
            codebook = self.codebook(layer)
            noise = torch.randn(codebook.shape, generator=generator).to(codebook)
            noise *= (self.config.noise_factor * variance).sqrt()
            codebook.copy_(self.draw_codes(layer, inputs, generator) + noise)
        self.log_variances[layer] = (self.config.variance_factor * variance).log()
