"""The image tokenizer: images to code indices and back."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.backbone import TimmBottomUpPath
from tokenizer.code_maps import check_images, check_indices, code_maps_of
from tokenizer.config import CodeMapConfig, NearestQuantizerConfig, TokenizerConfig
from tokenizer.networks import BottomUpPath, UpwardPath, Widths
from tokenizer.objective import (
    EvidenceLowerBound,
    TokenizerOutput,
    gaussian_code_length,
    gaussian_reconstruction,
    temperature_at,
)
from tokenizer.quantizers.base import Collective, Mode
from tokenizer.quantizers.nearest import NearestQuantizer
from tokenizer.quantizers.stochastic import StochasticQuantizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule
from tokenizer.topdown import TopDownOutput, TopDownPath

Images = Float[Tensor, "batch channels height width"]
Indices = list[Int[Tensor, "batch _ _ _"]]


class Encoding(NamedTuple):
    """Hard codes and what they were taken from, coarse to fine."""

    indices: Indices
    latents: list[Float[Tensor, "batch _ _ _"]]
    """Ẑ of each group, given the hard codes of the groups before."""


class Tokenizer(PretrainedModule[TokenizerConfig]):
    """SQ-VAE, SQ-VAE-2, RSQ-VAE, any hybrid, or their deterministic baselines, by its config."""

    config_class = TokenizerConfig
    total_steps: int | None = None
    """Steps of the training run, which the temperature is tied to; whoever trains sets it."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        downsamplings = [group.downsampling for group in config.groups]
        widths = Widths(config.networks, downsamplings[0])
        self.bottom_up: BottomUpPath | TimmBottomUpPath
        if config.backbone is None:
            self.bottom_up = BottomUpPath(widths, config.channels, downsamplings)
        else:
            self.bottom_up = TimmBottomUpPath(config.backbone, downsamplings)
        self.top_down = TopDownPath(config, widths, self.bottom_up.out_channels)
        patch_size = config.networks.patch_size
        self.decoder = UpwardPath(
            widths,
            config.groups[-1].code_dim,
            downsamplings[-1],
            patch_size,
            config.channels * patch_size**2,
        )

    # Training

    def forward(self, images: Images, step: int) -> TokenizerOutput:
        """The objective: with mixtures of codes in training mode, hard codes in evaluation mode.

        SSE is averaged over this batch before its logarithm: over micro-batches and processes the
        gradients of several such terms are averaged.

        Raises:
            InputError: the images do not fit the config, or `total_steps` is not set in training.
        """
        mode: Mode = "mixture" if self.training else "nearest"
        walk = self._walk(images, mode, self.temperature(step) if self.training else 1.0)
        reconstructions = self._to_images(walk.state)
        num_values = images[0].numel()
        squared_error = (images - reconstructions).square().sum() / len(images)
        layer_entropy = torch.cat([group.posterior_entropy for group in walk.groups], 1).mean(0)
        error = torch.stack([group.quantization_error.mean() for group in walk.groups]).sum()
        commitment = torch.stack([group.commitment.mean() for group in walk.groups]).sum()
        if isinstance(self.config.quantizer, NearestQuantizerConfig):
            reconstruction = squared_error / 2
            commitment = num_values / 2 * self.config.quantizer.commitment_weight * commitment
            latent_weight = 1.0
        else:
            reconstruction = gaussian_reconstruction(squared_error, num_values)
            latent_weight = self.config.quantizer.latent_weight
        entropy = layer_entropy.sum()
        return TokenizerOutput(
            loss=reconstruction + latent_weight * (error - entropy) + commitment,
            reconstruction=reconstruction,
            quantization_error=error,
            posterior_entropy=entropy,
            commitment=commitment,
            layer_entropy=layer_entropy,
            squared_error=squared_error,
            reconstructions=reconstructions,
            indices=[group.indices for group in walk.groups],
        )

    def temperature(self, step: int) -> float:
        """Gumbel-softmax temperature τ of a training step; 1 for the baselines."""
        if isinstance(self.config.quantizer, NearestQuantizerConfig):
            return 1.0
        if self.total_steps is None:
            raise InputError("total_steps must be set on the tokenizer before it is trained")
        return temperature_at(self.config.quantizer, step, self.total_steps)

    @torch.no_grad()
    def initialize_from_data(self, images: Images, generator: torch.Generator) -> None:
        """Sets codebooks and variances from encoder outputs; once, before the first step.

        The same images and a CPU generator in the same state give the same start everywhere.
        """
        check_images(images, self.config)
        parts = torch.split(images, 64)  # the activations of all take gigabytes
        features = [torch.cat(maps) for maps in zip(*map(self.bottom_up, parts), strict=True)]
        self.top_down(features, "nearest", initialization=generator)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the networks, not the quantizers; see `TopDownPath.compile`."""
        for part in (self.bottom_up, self.top_down, self.decoder):
            part.compile(*args, **kwargs)

    def update_codebooks(
        self,
        total: Collective = lambda tensor: tensor,
        from_main: Collective = lambda tensor: tensor,
    ) -> None:
        """Moves the baselines' codebooks; to be called after each optimizer step.

        Args:
            total: sums a tensor over all processes.
            from_main: gives every process the main process's tensor.
        """
        for group in self.top_down:
            if isinstance(group.quantizer, NearestQuantizer):
                group.quantizer.update_codebooks(total, from_main)

    def no_weight_decay(self) -> set[str]:
        """Names of the codebooks and variances, for timm's optimizers."""
        names = {name for name, _ in self.named_parameters()}
        return {name for name in names if ".codebooks." in name or name.endswith("log_variances")}

    def rate_factors(self) -> dict[str, float]:
        """Learning rates of codebooks and variances, in units of the networks'."""
        config = self.config.quantizer
        if isinstance(config, NearestQuantizerConfig):
            return {}
        return {
            name: config.codebook_rate if ".codebooks." in name else config.variance_rate
            for name in self.no_weight_decay()
        }

    # Images to indices and back

    @torch.no_grad()
    def encode(self, images: Images) -> Indices:
        """Hard code indices, one int64 (B, depth, h, w) per group, coarse to fine."""
        return self.encode_with_latents(images).indices

    @torch.no_grad()
    def encode_with_latents(self, images: Images) -> Encoding:
        """Hard code indices and the latents that they stand for."""
        walk = self._walk(images, "nearest")
        return Encoding([group.indices for group in walk.groups], walk.latents)

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor], num_layers: int | None = None) -> Images:
        """Images on about [-1, 1] from code indices.

        Args:
            indices: as from `encode`.
            num_layers: use only so many layers, counted from the coarsest (progressive decoding).

        Raises:
            InputError: indices of another shape or out of range, or no such number of layers.
        """
        sizes = self.codebook_sizes
        num_layers = len(sizes) if num_layers is None else num_layers
        if not 1 <= num_layers <= len(sizes):
            raise InputError(f"num_layers must be from 1 to {len(sizes)}, got {num_layers}")
        self._check_indices(indices)
        return self._to_images(self.top_down.decode(indices, num_layers))

    @torch.no_grad()
    def reconstruct(self, images: Images) -> Images:
        """Images after hard quantization."""
        return self._to_images(self._walk(images, "nearest").state)

    @torch.no_grad()
    def log_posteriors(
        self, latents: Sequence[Tensor], indices: Sequence[Tensor]
    ) -> list[list[Float[Tensor, "batch height width codes"]]]:
        """Logarithms of P_l of every layer of every group, given the codes of the layers before.

        Raises:
            InputError: the baselines have no posterior.
        """
        return [
            quantizer.log_posteriors(own_latents, own_indices)
            for quantizer, own_latents, own_indices in zip(
                self._stochastic_quantizers(), latents, indices, strict=True
            )
        ]

    @torch.no_grad()
    def evidence_lower_bound(
        self,
        images: Images,
        decoder_variance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> EvidenceLowerBound:
        """The exact bound with one hard sample of the codes from the posterior.

        -log P(x | Z) + Σ_g ‖Ẑ^g - Σ_l Z_l‖² / (2 Σ_l s_l²) - Σ_l H(P_l) + Σ_l (positions) log K_l

        Args:
            images: on [-1, 1].
            decoder_variance: σ² of the Gaussian around the reconstruction; None takes the best
                one for these images, SSE / D, so that a whole set is to be given at once or σ²
                to be fixed beforehand.
            generator: of the posterior samples, on the images' device.

        Raises:
            InputError: the baselines have no bound, or `decoder_variance` is not positive.
        """
        self._stochastic_quantizers()
        if decoder_variance is not None and not decoder_variance > 0:
            raise InputError(f"decoder_variance must be > 0, got {decoder_variance}")
        walk = self._walk(images, "sample", generator=generator)
        reconstructions = self._to_images(walk.state)
        squared_errors = (images - reconstructions).square().flatten(1).sum(1)
        num_values = images[0].numel()
        if decoder_variance is None:
            decoder_variance = squared_errors.mean().item() / num_values
        nats = gaussian_code_length(squared_errors, num_values, decoder_variance)
        for group, config in zip(walk.groups, self.config.groups, strict=True):
            num_positions = group.indices[0, 0].numel()
            uniform = num_positions * sum(math.log(size) for size in config.codebook_sizes)
            nats = nats + group.quantization_error - group.posterior_entropy.sum(1) + uniform
        return EvidenceLowerBound(nats, nats / (num_values * math.log(2)), squared_errors)

    # Shapes and parameters

    @property
    def codebook_sizes(self) -> list[int]:
        """Number of codes of each layer, coarse to fine over all groups."""
        return [size for group in self.config.groups for size in group.codebook_sizes]

    def code_maps(self, height: int, width: int) -> tuple[CodeMapConfig, ...]:
        """Shapes of the code indices of images of this size, coarse to fine.

        Raises:
            InputError: the coarsest downsampling does not divide the size.
        """
        return code_maps_of(self.config.groups, height, width)

    def code_vectors(self) -> list[list[Float[Tensor, "codes dim"]]]:
        """Code vectors (K, code_dim) of each layer of each group."""
        quantizers = [group.quantizer for group in self.top_down]
        return [
            [quantizer.codebook(layer).detach() for layer in range(quantizer.num_layers)]
            for quantizer in quantizers
        ]

    def dequantization_variances(self) -> Float[Tensor, " layers"]:
        """s² of each layer, coarse to fine over all groups; none for the baselines."""
        if isinstance(self.config.quantizer, NearestQuantizerConfig):
            return torch.zeros(0)
        return torch.cat([quantizer.variances() for quantizer in self._stochastic_quantizers()])

    def _check_indices(self, indices: Sequence[Tensor]) -> None:
        if not indices or indices[0].ndim != 4:
            raise InputError("indices must be (batch, depth, height, width) tensors, a group each")
        coarsest = self.config.groups[0].downsampling
        height, width = indices[0].shape[2:]
        check_indices(indices, self.code_maps(coarsest * height, coarsest * width))

    def _stochastic_quantizers(self) -> list[StochasticQuantizer]:
        quantizers = [group.quantizer for group in self.top_down]
        stochastic = [entry for entry in quantizers if isinstance(entry, StochasticQuantizer)]
        if len(stochastic) < len(quantizers):
            raise InputError("tokenizer.quantizer must be stochastic for this, got 'nearest'")
        return stochastic

    def _walk(
        self,
        images: Tensor,
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> TopDownOutput:
        check_images(images, self.config)
        features = self.bottom_up(images)
        return self.top_down(features, mode, temperature, generator)  # type: ignore[no-any-return]

    def _to_images(self, state: Tensor) -> Tensor:
        """x̂ from the state y; in float32 whatever the autocast, since SSE is summed from it."""
        patches = self.decoder(state)
        images = torch.nn.functional.pixel_shuffle(patches, self.config.networks.patch_size)
        return images if images.dtype == torch.float64 else images.float()
