"""Top-down path: resolution groups of injected and residual layers (HQ-VAE, arXiv 2401.00365)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.networks import UpwardPath, Widths
from tokenizer.quantizers import BuildQuantizer, Quantizer, QuantizerOutput
from tokenizer.quantizers.base import Mode, at_least_float32


class TopDownGroup(nn.Module):
    """The layers of one resolution.

    Injected layer: U = up(y), Ẑ = f(concat[U, features]), y = U + Z. The residual layers quantize
    what is left of Ẑ and add to y.
    """

    quantizer: Quantizer

    def __init__(
        self,
        config: TokenizerConfig,
        position: int,
        widths: Widths,
        num_features: int,
        build_quantizer: BuildQuantizer,
    ) -> None:
        super().__init__()
        group = config.groups[position]
        factor = group.downsampling
        self.up: UpwardPath | None = None
        if position > 0:
            coarser = config.groups[position - 1]
            self.up = UpwardPath(
                widths, coarser.code_dim, coarser.downsampling, factor, group.code_dim
            )
            num_features += group.code_dim
        self.to_latents = UpwardPath(widths, num_features, factor, factor, group.code_dim)
        self.quantizer = build_quantizer(group)

    def upsampled(self, state: Tensor | None) -> Float[Tensor, "batch dim height width"] | None:
        """U = up(y), or None for the coarsest group."""
        if self.up is None:
            return None
        assert state is not None
        # The state adds up in float32 whatever the type of the weights.
        output: Tensor = self.up(state.to(next(self.up.parameters()).dtype))
        return output

    def latents(
        self, upsampled: Tensor | None, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        """Ẑ = f(concat[U, features])."""
        inputs = features if upsampled is None else torch.cat([upsampled, features], 1)
        output: Tensor = self.to_latents(inputs)
        return output

    def quantized(
        self, indices: Int[Tensor, "batch depth height width"], num_layers: int | None = None
    ) -> Float[Tensor, "batch dim height width"]:
        """Sum of the code vectors of the first layers, all by default."""
        depth = self.quantizer.num_layers
        codebooks = [at_least_float32(self.quantizer.codebook(layer)) for layer in range(depth)]
        total = torch.zeros_like(codebooks[0][indices[:, 0]])  # (B, H, W, D)
        for layer in range(depth if num_layers is None else min(num_layers, depth)):
            total = total + codebooks[layer][indices[:, layer]]
        return total.movedim(-1, 1)


class TopDownOutput(NamedTuple):
    """Of all groups, coarse to fine."""

    state: Float[Tensor, "batch dim height width"]
    """y after the last group: what the decoder sees."""
    latents: list[Float[Tensor, "batch _ _ _"]]
    """Ẑ of each group."""
    groups: list[QuantizerOutput]


class Encoding(NamedTuple):
    """Hard codes and what they were taken from, coarse to fine."""

    indices: list[Int[Tensor, "batch _ _ _"]]
    latents: list[Float[Tensor, "batch _ _ _"]]
    """Ẑ of each group, given the hard codes of the groups before."""


class TopDownPath(nn.Module):
    """All resolution groups, coarse to fine; the state y depends on the codes alone."""

    def __init__(
        self,
        config: TokenizerConfig,
        widths: Widths,
        feature_channels: Sequence[int],
        build_quantizer: BuildQuantizer,
    ) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            TopDownGroup(config, position, widths, channels, build_quantizer)
            for position, channels in enumerate(feature_channels)
        )

    def __iter__(self) -> Iterator[TopDownGroup]:
        """The groups, coarse to fine."""
        return iter(cast(Iterable[TopDownGroup], self.groups))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the networks in place: names of weights stay, and copies are not compiled.

        Not the quantizers: their noise would be another, and the temperature of each step would
        have them compiled anew.
        """
        for group in self:
            for part in (group.up, group.to_latents):
                if part is not None:
                    part.compile(*args, **kwargs)

    def forward(
        self,
        features: Sequence[Float[Tensor, "batch _ _ _"]],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        initialization: torch.Generator | None = None,
    ) -> TopDownOutput:
        """Quantizes the features of each group.

        With `initialization`, each quantizer starts from the latents that it meets, first.
        """
        state: Tensor | None = None
        latents, outputs = [], []
        for group, group_features in zip(self, features, strict=True):
            upsampled = group.upsampled(state)
            latents.append(group.latents(upsampled, group_features))
            if initialization is not None:
                group.quantizer.initialize(latents[-1], initialization)
            outputs.append(group.quantizer(latents[-1], mode, temperature, generator))
            quantized = outputs[-1].quantized
            state = quantized if upsampled is None else upsampled + quantized
        assert state is not None
        return TopDownOutput(state, latents, outputs)

    def decode(
        self, indices: Sequence[Int[Tensor, "batch _ _ _"]], num_layers: int
    ) -> Float[Tensor, "batch dim height width"]:
        """The state y from the first `num_layers` layers; the later ones add nothing."""
        quantized = []
        for group, group_indices in zip(self, indices, strict=True):
            quantized.append(group.quantized(group_indices, num_layers))
            num_layers = max(num_layers - group.quantizer.num_layers, 0)
        return self.states(quantized)[-1]

    def states(
        self, quantized: Sequence[Float[Tensor, "batch _ _ _"]], upsampled: Tensor | None = None
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """The state y after each of the last groups, as many as `quantized` has.

        Args:
            quantized: what stands for the latents of these groups, coarse to fine.
            upsampled: U of the first of them; None for the coarsest, which has none.
        """
        states: list[Tensor] = []
        for group, group_quantized in zip(
            list(self)[len(self.groups) - len(quantized) :], quantized, strict=True
        ):
            upsampled = group.upsampled(states[-1]) if states else upsampled
            states.append(group_quantized if upsampled is None else upsampled + group_quantized)
        return states
