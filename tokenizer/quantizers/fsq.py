"""Finite scalar quantization (FSQ, arXiv 2309.15505): a grid in few dimensions, nothing learned."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from tokenizer.quantizers.base import (
    GroupConfig,
    Mode,
    Quantizer,
    QuantizerOutput,
    at_least_float32,
    full_precision,
)
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.errors import InputError


class FiniteScalarQuantizerConfig(StrictConfig):
    """Finite scalar quantization (FSQ, arXiv 2309.15505)."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2, le=1024)], ...] = (8, 8, 4)
    """Values per dimension of the grid; their product is the codebook size of every layer."""


class FiniteScalarQuantizer(Quantizer):
    """Each layer rounds a projection of its inputs to a grid on [-1, 1]; straight-through gradient.

    Several layers are residual, each with projections of its own. There are no latent terms.

    Raises:
        InputError: a codebook size is not the number of the grid's points, or is to be shared.
    """

    levels: Tensor

    def __init__(self, group: GroupConfig, config: FiniteScalarQuantizerConfig) -> None:
        super().__init__(group)
        size, num_dims = math.prod(config.levels), len(config.levels)
        if set(group.codebook_sizes) != {size} or group.shares_codebook:
            raise InputError(
                f"codebook_sizes must all be {size}, the product of levels {config.levels}, "
                f"and not shared, got {group.codebook_sizes}"
            )
        # Part of the weights: what decides the codes is saved and hashed with them.
        self.register_buffer("levels", torch.tensor(config.levels))
        layers = range(group.num_layers)
        self.project_in = nn.ModuleList(nn.Linear(group.code_dim, num_dims) for _ in layers)
        self.project_out = nn.ModuleList(nn.Linear(num_dims, group.code_dim) for _ in layers)

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Projections of the grid's points; the first dimension changes fastest."""
        axes = [torch.arange(count) for count in self.levels.flip(0).tolist()]
        digits = torch.cartesian_prod(*axes).view(-1, len(axes)).flip(1).to(self.levels.device)
        return self._project_out(layer, (digits - self.levels // 2).to(next(self.parameters())))

    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantizes `latents`, whatever `temperature` and `generator`."""
        batch, _, height, width = latents.shape
        with full_precision(latents.device):
            residual = at_least_float32(latents).movedim(1, -1).flatten(0, 2)  # (N, D)
            quantized, indices = torch.zeros_like(residual), []
            for layer in range(self.num_layers):
                bounded = self._bounded(self.project_in[layer](residual))
                points = bounded + (bounded.round() - bounded).detach()
                digits = bounded.detach().round().long() + self.levels // 2
                chosen = (digits * (self.levels.cumprod(0) // self.levels)).sum(1)
                is_trained = mode == "mixture"
                vectors = (
                    self._project_out(layer, points) if is_trained else self.codebook(layer)[chosen]
                )
                quantized, residual = quantized + vectors, residual - vectors
                indices.append(chosen.view(batch, height, width))
        quantized = quantized.view(batch, height, width, -1).movedim(-1, 1)
        entropies = quantized.new_zeros(batch, self.num_layers)
        return QuantizerOutput(quantized, torch.stack(indices, 1), entropies, {})

    def _bounded(self, values: Tensor) -> Tensor:
        """tanh, scaled and shifted so that rounding gives the levels, and zero gives zero."""
        half = (self.levels - 1).to(values) / 2 * (1 + 1e-3)
        offset = (self.levels % 2 == 0).to(values) / 2
        return half * (values + (offset / half).atanh()).tanh() - offset

    def _project_out(self, layer: int, points: Tensor) -> Tensor:
        """Code vectors of points of the grid, which is scaled to [-1, 1]."""
        with full_precision(points.device):  # decoding may be autocast
            vectors: Tensor = self.project_out[layer](points / (self.levels // 2))
        return vectors
