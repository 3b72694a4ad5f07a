"""Changes to stochastic quantization that did not become options, for the ablations."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.config import GroupConfig, StochasticQuantizerConfig
from tokenizer.quantizers.base import Mode, QuantizerOutput, at_least_float32, full_precision
from tokenizer.quantizers.mixture import proximity, stochastic_quantization
from tokenizer.quantizers.stochastic import StochasticQuantizer

Variant = Literal["per-layer-terms", "expected-terms", "hard-phase", "no-noise"]


class VariantQuantizer(StochasticQuantizer):
    """One group, with other terms or with nearest codes in training.

    per-layer-terms: Σ_l ‖r_l - Z_l‖² / (2 s_l²), a model without the sum of variances.
    expected-terms: the last layer's squared distance is its expectation under P, not the mixture's.
    no-noise: the mixture's weights are the posterior's, sharpened by τ, without Gumbel noise.
    hard-phase: when `is_hard` is set, nearest codes with the gradient of the posterior's mean.
    """

    def __init__(
        self, group: GroupConfig, config: StochasticQuantizerConfig, variant: Variant
    ) -> None:
        super().__init__(group, config)
        self.variant = variant
        self.is_hard = False

    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """As the parent's; differs in training alone."""
        if mode != "mixture" or (self.variant == "hard-phase" and not self.is_hard):
            return super().forward(latents, mode, temperature, generator)
        batch, _, height, width = latents.shape
        with full_precision(latents.device):
            variances = self.variances()
            residual = at_least_float32(latents).movedim(1, -1).flatten(0, 2)  # (N, D)
            quantized = torch.zeros_like(residual)
            indices, entropies, errors = [], [], []
            for layer in range(self.num_layers):
                codebook, variance = self.codebook(layer), variances[layer]
                draw = stochastic_quantization(
                    residual, codebook, variance, temperature, mode, generator
                )
                scores = proximity(residual, codebook)
                posterior = (scores / variance).softmax(1)
                chosen = draw.quantized
                if self.variant == "no-noise":
                    chosen = (scores / variance / temperature).softmax(1) @ codebook
                elif self.is_hard:
                    mean = posterior @ codebook
                    chosen = mean + (codebook[scores.argmax(1)] - mean).detach()
                expected = residual.square().sum(1) - 2 * (posterior * scores).sum(1)
                quantized = quantized + chosen
                residual = residual - chosen
                mixture = residual.square().sum(1)
                is_last = layer == self.num_layers - 1
                if self.variant == "per-layer-terms":
                    errors.append(mixture / (2 * variance))
                elif is_last:
                    is_expected = self.variant == "expected-terms"
                    errors.append((expected if is_expected else mixture) / (2 * variances.sum()))
                indices.append(draw.indices.view(batch, height, width))
                entropies.append(draw.posterior_entropy.view(batch, -1).sum(1))
            error = torch.stack(errors).sum(0).view(batch, -1).sum(1)
        return QuantizerOutput(
            quantized.view(batch, height, width, -1).movedim(-1, 1),
            torch.stack(indices, 1),
            torch.stack(entropies, 1),
            {"quantization_error": error},
        )
