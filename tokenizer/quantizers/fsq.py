"""Finite scalar quantization (FSQ, arXiv 2309.15505): a fixed grid in few dimensions."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.config import FiniteScalarQuantizerConfig, GroupConfig
from tokenizer.quantizers.base import (
    Mode,
    Quantizer,
    QuantizerOutput,
    at_least_float32,
    full_precision,
)
from tokenizer.storage.errors import InputError


class FiniteScalarQuantizer(Quantizer):
    """Each layer rounds a projection of its inputs to a grid on [-1, 1]; straight-through gradient.

    Several layers are residual, each with projections of its own. There are no latent terms.
    """

    def __init__(self, group: GroupConfig, config: FiniteScalarQuantizerConfig) -> None:
        super().__init__(group)
        self.size = math.prod(config.levels)
        if set(group.codebook_sizes) != {self.size} or group.shares_codebook:
            raise InputError(
                f"codebook_sizes must all be {self.size}, the product of levels {config.levels}, "
                f"and not shared, got {group.codebook_sizes}"
            )
        # Part of the weights: what decides the codes is saved and hashed with them.
        self.levels = nn.Buffer(torch.tensor(config.levels))
        self.place_values = nn.Buffer(self.levels.cumprod(0) // self.levels, persistent=False)
        layers, num_dims = range(group.num_layers), len(config.levels)
        self.project_in = nn.ModuleList(nn.Linear(group.code_dim, num_dims) for _ in layers)
        self.project_out = nn.ModuleList(nn.Linear(num_dims, group.code_dim) for _ in layers)

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Projections of the grid's points; the first dimension changes fastest."""
        indices = torch.arange(self.size, device=self.levels.device).unsqueeze(1)
        digits = indices // self.place_values % self.levels  # (K, dimensions)
        points = at_least_float32((digits - self.levels // 2).to(next(self.parameters())))
        return self._vectors(layer, points)

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
            residual = at_least_float32(latents).movedim(1, -1).contiguous().flatten(0, 2)  # (N, D)
            quantized, indices = torch.zeros_like(residual), []
            for layer in range(self.num_layers):
                bounded = self._bounded(_projected(self.project_in[layer], residual))
                points = bounded + (bounded.round() - bounded).detach()
                digits = bounded.detach().nan_to_num().round().long() + self.levels // 2
                chosen = (digits * self.place_values).sum(1)
                is_soft = mode == "mixture"
                vectors = self._vectors(layer, points) if is_soft else self.codebook(layer)[chosen]
                quantized, residual = quantized + vectors, residual - vectors
                indices.append(chosen.view(batch, height, width))
        quantized = quantized.view(batch, height, width, -1).movedim(-1, 1)
        entropies = quantized.new_zeros(batch, self.num_layers)
        return QuantizerOutput(quantized, torch.stack(indices, 1), entropies, {})

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        wanted, found = (
            tuple(levels.tolist()) for levels in (self.levels, state[prefix + "levels"])
        )
        if found != wanted:
            raise InputError(f"levels must be {wanted}, as in the config, got {found}")
        super()._load_from_state_dict(state, prefix, *others)

    def _bounded(self, values: Tensor) -> Tensor:
        """tanh, scaled and shifted so that rounding gives the levels, and zero gives zero."""
        half = (self.levels - 1).to(values) / 2 * (1 + 1e-3)
        offset = (self.levels % 2 == 0).to(values) / 2
        return half * (values + (offset / half).atanh()).tanh() - offset

    def _vectors(self, layer: int, points: Tensor) -> Tensor:
        """Code vectors of points of the grid, which is scaled to [-1, 1]."""
        with full_precision(points.device):  # decoding may be autocast
            return _projected(self.project_out[layer], points / (self.levels // 2))


def _projected(linear: Any, inputs: Tensor) -> Tensor:
    weight, bias = at_least_float32(linear.weight), at_least_float32(linear.bias)
    return nn.functional.linear(inputs, weight, bias)
