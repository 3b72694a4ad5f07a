"""The image tokenizer: images to code indices and back."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenizer.backbone import TimmBottomUpPath
from tokenizer.code_maps import check_images, given_images, given_indices
from tokenizer.code_prior import CodePrior, CodeTerms, most_likely
from tokenizer.config import TokenizerConfig, without_recipe
from tokenizer.networks import BottomUpPath, ImageDecoder, Widths
from tokenizer.objective import (
    BoundCodes,
    EvidenceLowerBound,
    TokenizerOutput,
    bound_of,
    check_bound,
)
from tokenizer.own_prior import WithOwnPrior
from tokenizer.quantizers import BuildQuantizer, build_quantizer
from tokenizer.quantizers.base import Collective, Mode
from tokenizer.search import CodeCosts, search_codes
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.sensitivity import Decoding
from tokenizer.storage.errors import InputError
from tokenizer.storage.hashes import weights_hash
from tokenizer.topdown import Encoding, TopDownOutput, TopDownPath

Images = Float[Tensor, "batch channels height width"]
Indices = list[Int[Tensor, "batch _ _ _"]]


class Tokenizer(WithOwnPrior):
    """SQ-VAE, SQ-VAE-2, RSQ-VAE, any hybrid, or their deterministic baselines, by its config.

    Args:
        config: Groups, networks and quantizer.
        quantizer: Builds a `Quantizer` from outside the package for a `GroupConfig`, in place of
            the config's; loading takes it again: `from_pretrained(folder, quantizer=...)`.

    Raises:
        InputError: the parts of the config do not fit each other.
    """

    config_class = TokenizerConfig

    def __init__(self, config: TokenizerConfig, quantizer: BuildQuantizer | None = None) -> None:
        if quantizer is not None:
            config = config.with_custom_quantizer(quantizer)
        super().__init__(config)
        downsamplings = [group.downsampling for group in config.groups]
        widths = Widths(config.networks, downsamplings[0])
        self.bottom_up: BottomUpPath | TimmBottomUpPath
        if config.backbone is None:
            self.bottom_up = BottomUpPath(widths, config.channels, downsamplings)
        else:
            self.bottom_up = TimmBottomUpPath(config.backbone, downsamplings)
        self.top_down = TopDownPath(
            config, widths, self.bottom_up.out_channels, quantizer or build_quantizer(config)
        )
        self.decoder = ImageDecoder(
            widths, config.groups[-1].code_dim, downsamplings[-1], config.channels
        )
        self.code_prior = CodePrior(config) if config.code_prior.width else None

    def identity_hash(self) -> str:
        """SHA-256 over what decides the codes and what they stand for, and nothing that follows."""
        others = ("decoder.", "code_prior.")
        weights = self.state_dict()
        return weights_hash({n: w for n, w in weights.items() if not n.startswith(others)})

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields of an earlier format in today's; see `without_recipe`."""
        return without_recipe(fields) if version == 1 else fields

    # Training

    def forward(self, images: Images, temperature: float = 1.0) -> TokenizerOutput:
        """Terms of the objective, with mixtures of codes in training mode and hard ones otherwise.

        Args:
            images: on [-1, 1].
            temperature: τ > 0 of the Gumbel-softmax in training mode.

        Raises:
            InputError: the images do not fit the config.
        """
        output = self._quantize(images, "mixture" if self.training else "nearest", temperature)
        groups = output.groups
        names = dict.fromkeys(name for group in groups for name in group.latent_terms)
        return TokenizerOutput(
            reconstructions=self.decoder(output.state),
            indices=[group.indices for group in groups],
            layer_entropy=torch.cat([group.posterior_entropy for group in groups], 1).mean(0),
            latent_terms={
                name: torch.stack([group.latent_terms[name].mean() for group in groups]).sum()
                for name in names
            },
            code_terms=self._code_terms(output) if self.training else None,
        )

    def _code_terms(self, output: TopDownOutput) -> CodeTerms | None:
        if self.code_prior is None:
            return None
        indices = [group.indices for group in output.groups]
        return self.code_prior.terms(self.top_down, indices, output.latents)

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

    def after_step(
        self,
        total: Collective = lambda tensor: tensor,
        from_main: Collective = lambda tensor: tensor,
    ) -> None:
        """To be called after each optimizer step; see `Quantizer.after_step`."""
        for quantizer in self.quantizers:
            quantizer.after_step(total, from_main)

    # Images to indices and back

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        search: SearchConfig = NO_SEARCH,
        costs: CodeCosts | None = None,
    ) -> Indices:
        """Hard code indices, one int64 (B, depth, h, w) per group, coarse to fine.

        Args:
            images: on [-1, 1], of any floating-point type, on any device; waits for it.
            search: for better codes than the nearest ones; see `tokenizer/search.py`.
            costs: of the codes, where `search.rate_weight` counts them.

        Raises:
            InputError: they do not fit the config, or are not finite or far outside [-1, 1]; or
                the search is to count costs and there are none.
        """
        costs = self.costs_for(search, costs)
        indices = self.encode_with_latents(images).indices
        decoding = Decoding(self.top_down, self.decoder, self.config.groups)
        return search_codes(decoding, images.to(self._weight.device), indices, search, costs)

    @torch.no_grad()
    def encode_with_latents(self, images: Images) -> Encoding:
        """Hard code indices and the latents that they stand for; as `encode`."""
        output = self._quantize(given_images(images, self.config, self._weight), "nearest")
        return Encoding([group.indices for group in output.groups], output.latents)

    @torch.no_grad()
    def decode(self, indices: Sequence[Tensor], num_layers: int | None = None) -> Images:
        """Images on about [-1, 1] from code indices.

        Args:
            indices: as from `encode`, on any device.
            num_layers: use only so many layers, counted from the coarsest (progressive decoding);
                the others add nothing, or what the tokenizer's own prior takes for most likely.

        Raises:
            InputError: indices of another shape or out of range, or no such number of layers.
        """
        sizes = self.codebook_sizes
        num_layers = len(sizes) if num_layers is None else num_layers
        if not isinstance(num_layers, int) or not 1 <= num_layers <= len(sizes):
            raise InputError(f"num_layers must be from 1 to {len(sizes)}, got {num_layers!r}")
        indices = given_indices(indices, self.config, self._weight)
        if self.code_prior is not None and num_layers < len(sizes):
            indices = self.code_prior.completed(self.top_down, indices, num_layers, most_likely)
            num_layers = len(sizes)
        return self.decoder(self.top_down.decode(indices, num_layers))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reconstruct(
        self, images: Images, search: SearchConfig = NO_SEARCH, costs: CodeCosts | None = None
    ) -> Images:
        """Images after hard quantization; takes what `encode` takes."""
        images = given_images(images, self.config, self._weight)
        return self.decode(self.encode(images, search, costs))

    @torch.no_grad()
    def log_posteriors(
        self, latents: Sequence[Tensor], indices: Sequence[Tensor]
    ) -> list[list[Float[Tensor, "batch height width codes"]]]:
        """Logarithms of P_l of every layer of every group, given the codes of the layers before.

        Raises:
            InputError: the quantizer has no posterior.
        """
        groups = zip(self.quantizers, latents, indices, strict=True)
        return [quantizer.log_posteriors(*group) for quantizer, *group in groups]

    @torch.no_grad()
    def evidence_lower_bound(
        self,
        images: Images,
        decoder_variance: float | None = None,
        generator: torch.Generator | None = None,
        codes: BoundCodes = "posterior",
    ) -> EvidenceLowerBound:
        """An exact upper bound of -log p(image), where p(codes) is uniform or the own prior.

        -log P(x | Z) - Σ_l H(P_l) - log p(codes), the last being Σ_l (positions) log K_l

        The decoder sees codes alone, so the dequantized latents of the training objective are
        integrated out. With "posterior" Z is one sample of it; with "nearest" the approximate
        posterior is a point mass at the nearest codes, whose entropy is 0.

        Args:
            images: 8-bit images on [-1, 1].
            decoder_variance: σ² of the Gaussian around the reconstruction; None takes SSE / D of
                these images, so that a whole set is to be given at once or σ² to be fixed before.
            generator: of the posterior samples, on the images' device.
            codes: which approximate posterior.

        Raises:
            InputError: there is no posterior, or `decoder_variance` is no positive number.
        """
        check_bound(decoder_variance, codes, self.has_posterior)
        images = given_images(images, self.config, self._weight)
        mode: Mode = "sample" if codes == "posterior" else "nearest"
        output = self._quantize(images, mode, generator=generator)
        nats = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        if self.code_prior is not None:
            lengths = self.code_length([group.indices for group in output.groups])
            nats = lengths.sum(1) * math.log(2)
        for group, config in zip(output.groups, self.config.groups, strict=True):
            if self.code_prior is None:
                nats += group.indices[0, 0].numel() * sum(map(math.log, config.codebook_sizes))
            nats -= group.posterior_entropy.double().sum(1)
        return bound_of(images, self.decoder(output.state), nats, decoder_variance)

    def _quantize(
        self,
        images: Tensor,
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> TopDownOutput:
        check_images(images, self.config)
        features = self.bottom_up(images.to(self._weight.dtype))
        return self.top_down(features, mode, temperature, generator)  # type: ignore[no-any-return]
