"""Stochastic quantization (SQ-VAE, arXiv 2205.07547) of one group (HQ-VAE, arXiv 2401.00365)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.config import GroupConfig, StochasticQuantizerConfig
from tokenizer.quantizers.base import (
    Mode,
    QuantizerOutput,
    at_least_float32,
    full_precision,
    random_rows,
)
from tokenizer.quantizers.mixture import nearest_codes, proximity, stochastic_quantization
from tokenizer.storage.errors import InputError


class StochasticQuantizer(nn.Module):
    """The layers of one group: each quantizes what the layers before it left over.

    One layer is SQ-VAE; several are RSQ-VAE (HQ-VAE, section 4).
    """

    def __init__(self, group: GroupConfig, config: StochasticQuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_layers = group.num_layers
        sizes = group.codebook_sizes[:1] if group.shares_codebook else group.codebook_sizes
        self.codebooks = nn.ParameterList(torch.randn(size, group.code_dim) for size in sizes)
        self.log_variances = nn.Parameter(torch.zeros(group.num_layers))

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Code vectors of a layer."""
        codebook: Tensor = self.codebooks[layer % len(self.codebooks)]
        return codebook

    def variances(self) -> Float[Tensor, " layers"]:
        """s² of each layer."""
        return self.log_variances.exp()

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
                    residual, self.codebook(layer), variances[layer], temperature, mode, generator
                )
                quantized = quantized + draw.quantized
                residual = residual - draw.quantized  # not detached
                indices.append(draw.indices.view(batch, height, width))
                entropies.append(draw.posterior_entropy.view(batch, -1).sum(1))
            error = residual.square().reshape(batch, -1).sum(1) / (2 * variances.sum())
        return QuantizerOutput(
            quantized.view(batch, height, width, -1).movedim(-1, 1),
            torch.stack(indices, 1),
            error,
            torch.stack(entropies, 1),
            torch.zeros_like(error),
        )

    def log_posteriors(
        self,
        latents: Float[Tensor, "batch dim height width"],
        indices: Int[Tensor, "batch depth height width"],
    ) -> list[Float[Tensor, "batch height width codes"]]:
        """Logarithm of P_l(k | residual of layer l), given the codes of the layers before."""
        with full_precision(latents.device):
            residual = at_least_float32(latents).movedim(1, -1)  # (B, H, W, D)
            log_posteriors = []
            for layer, variance in enumerate(self.variances()):
                scores = proximity(residual.flatten(0, 2), self.codebook(layer), 1 / variance)
                log_posterior = scores.log_softmax(1)
                log_posteriors.append(log_posterior.view(*residual.shape[:3], -1))
                residual = residual - self.codebook(layer)[indices[:, layer]]
        return log_posteriors

    @torch.no_grad()
    def initialize(
        self, latents: Float[Tensor, "batch dim height width"], generator: torch.Generator
    ) -> None:
        """Start from the data: code vectors = random latents plus noise, s² ∝ their variance.

        A shared codebook starts from the inputs of the first layer.

        Raises:
            InputError: all inputs of a layer are equal, or one is not finite.
        """
        residual = latents.movedim(1, -1).flatten(0, 2).to(self.log_variances.dtype)
        for layer in range(self.num_layers):
            variance = residual.var(0, correction=0).mean()
            if not variance > 0:
                raise InputError(
                    "images: to start from them, what layer "
                    f"{layer} gets must vary, got variance {variance.item()}"
                )
            codebook = self.codebook(layer)
            if layer < len(self.codebooks):
                noise = torch.randn(codebook.shape, generator=generator).to(codebook)
                noise *= (self.config.noise_factor * variance).sqrt()
                codebook.copy_(random_rows(residual, len(codebook), generator) + noise)
            self.log_variances[layer] = (self.config.variance_factor * variance).log()
            residual = residual - codebook[nearest_codes(residual, codebook)]
