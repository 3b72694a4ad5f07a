"""Parameters of the tokenizer."""

import re
from typing import Annotated, Literal

from pydantic import Field
from pydantic import model_validator as validates

from tokenizer.storage.configs import StrictConfig

Share = Annotated[float, Field(ge=0, le=1)]
ProperShare = Annotated[float, Field(ge=0, lt=1)]
# Bounds that no sound model reaches, so that a config cannot ask for absurd amounts of memory or
# for numbers that leave float32.
Width = Annotated[int, Field(gt=0, le=2**14)]
Depth = Annotated[int, Field(gt=0, le=64)]
Downsampling = Annotated[int, Field(gt=0, le=1024)]
MapSide = Annotated[int, Field(gt=0, le=4096)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
PositiveFactor = Annotated[float, Field(ge=1e-6, le=1e6)]
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
CodebookSizes = Annotated[
    tuple[Annotated[int, Field(gt=0, le=2**20)], ...], Field(min_length=1, max_length=64)
]


class StochasticQuantizerConfig(StrictConfig):
    """Stochastic quantization (SQ-VAE, arXiv 2205.07547)."""

    kind: Literal["stochastic"] = "stochastic"
    variance_factor: PositiveFactor = 5.0
    """Initial variance s² of a layer, in units of its inputs' variance per dimension."""
    noise_factor: Factor = 0.2
    """Variance of the noise on the initial code vectors, in the same units."""
    initial_temperature: Temperature = 1.0
    """Gumbel-softmax temperature at step 0."""
    final_temperature: Temperature = 0.4
    """Gumbel-softmax temperature at the last step, reached exponentially."""
    temperature_hold: ProperShare = 0.7
    """Share of the steps before the temperature starts to fall."""
    latent_weight: PositiveFactor = 0.3
    """Weight of the latent terms against the reconstruction; at 1 the loss is the bound."""
    codebook_rate: PositiveFactor = 10.0
    """Learning rate of the code vectors, in units of the networks'."""
    variance_rate: Factor = 10.0
    """Learning rate of log s², in units of the networks'; 0 keeps the initial variances."""


class NearestQuantizerConfig(StrictConfig):
    """Deterministic baselines: nearest code, straight-through gradient, codebooks as moving means.

    Sources: VQ-VAE (arXiv 1711.00937), VQ-VAE-2 (arXiv 1906.00446), RQ-VAE (arXiv 2203.01941).
    """

    kind: Literal["nearest"] = "nearest"
    starts_from_data: bool = True
    """Draw the initial code vectors from encoder outputs, not from N(0, 1)."""
    decay: Share = 0.99
    """Decay of the moving means."""
    restart_threshold: Factor = 1.0
    """A code whose moving count falls below this is replaced by an encoder output; 0 = never."""
    commitment_weight: Factor = 0.25
    """Weight of the commitment term."""


QuantizerConfig = Annotated[
    StochasticQuantizerConfig | NearestQuantizerConfig, Field(discriminator="kind")
]


class GroupConfig(StrictConfig):
    """The layers that work at one resolution: the first is injected, the others are residual."""

    downsampling: Downsampling
    """Image side over code map side; a power of two."""
    codebook_sizes: CodebookSizes
    """Number K of code vectors of each layer; as many layers as numbers."""
    code_dim: Width = 64
    """Dimension of a code vector."""
    shares_codebook: bool = False
    """Whether all layers of the group use one codebook."""

    @validates(mode="after")
    def _check(self) -> "GroupConfig":
        if self.downsampling & (self.downsampling - 1):
            raise ValueError(f"downsampling must be a power of two, got {self.downsampling}")
        if self.shares_codebook and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                "codebook_sizes must be equal where shares_codebook is set, "
                f"got {self.codebook_sizes}"
            )
        return self

    @property
    def num_layers(self) -> int:
        """Depth of the group."""
        return len(self.codebook_sizes)


class NetworkConfig(StrictConfig):
    """Residual networks around the quantizers."""

    patch_size: Downsampling = 2
    """The image enters and leaves as patches of this side (pixel unshuffle); a power of two."""
    width: Width = 128
    """Channels at the resolution of the patches."""
    max_width: Width = 256
    """Channels double at each halving of the resolution, up to this."""
    num_blocks: Depth = 2
    """Residual blocks per resolution and direction."""
    attention_downsampling: Annotated[tuple[Downsampling, ...], Field(max_length=16)] = ()
    """Resolutions, as downsampling factors, with self-attention after the blocks."""


class BackboneConfig(StrictConfig):
    """A timm model as bottom-up path."""

    name: Annotated[str, Field(max_length=100)]
    """Name in timm's registry; the model must support `features_only`."""
    is_frozen: bool = True
    """Keep its weights; it then stays in evaluation mode."""
    pad_type: Literal["", "same"] = ""
    """Padding of its convolutions; "same" for weights converted from TensorFlow."""
    mean: tuple[Mean, Mean, Mean] | None = None
    """Channel means of its inputs on [0, 1]; None takes those of timm's entry."""
    std: tuple[PositiveFactor, PositiveFactor, PositiveFactor] | None = None
    """Channel deviations of its inputs on [0, 1]; None takes those of timm's entry."""

    @validates(mode="after")
    def _check(self) -> "BackboneConfig":
        # timm would also take "hf-hub:..." and "local-dir:...": a download, or a foreign folder.
        if not re.fullmatch(r"\w+(\.\w+)?", self.name, re.ASCII):
            raise ValueError(
                f"name must be one of timm's registry, such as 'mobilenetv2_100', got {self.name!r}"
            )
        return self


class TokenizerConfig(StrictConfig):
    """A hierarchical tokenizer: SQ-VAE-2, RSQ-VAE, a hybrid, or a deterministic baseline."""

    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1, max_length=16)]
    """Resolution groups, coarse to fine."""
    quantizer: QuantizerConfig = StochasticQuantizerConfig()
    networks: NetworkConfig = NetworkConfig()
    backbone: BackboneConfig | None = None
    """A timm model in place of the own bottom-up path."""
    channels: Annotated[int, Field(ge=1, le=4)] = 3
    """Image channels."""

    @validates(mode="after")
    def _check(self) -> "TokenizerConfig":
        factors = [group.downsampling for group in self.groups]
        if factors != sorted(set(factors), reverse=True):
            raise ValueError(
                f"groups must go from coarse to fine, each downsampling once, got {factors}"
            )
        patch_size = self.networks.patch_size
        if patch_size & (patch_size - 1) or patch_size > factors[-1]:
            raise ValueError(
                "networks.patch_size must be a power of two of at most the finest downsampling "
                f"{factors[-1]}, got {patch_size}"
            )
        reached = {
            1 << power for power in range(factors[0].bit_length()) if 1 << power >= patch_size
        }
        unused = set(self.networks.attention_downsampling) - reached
        if unused:
            raise ValueError(
                "networks.attention_downsampling must be powers of two from the patch size "
                f"{patch_size} to the coarsest downsampling {factors[0]}, got {sorted(unused)}"
            )
        if self.backbone is not None and self.channels != 3:
            raise ValueError(f"channels must be 3 with a backbone, got {self.channels}")
        return self


class CodeMapConfig(StrictConfig):
    """Shape of one group's code indices, (B, depth, height, width)."""

    height: MapSide
    """Rows."""
    width: MapSide
    """Columns."""
    codebook_sizes: CodebookSizes
    """Number of codes of each layer; the depth is their count."""
    code_dim: Width
    """Dimension of a code vector."""

    @property
    def depth(self) -> int:
        """Layers at this resolution."""
        return len(self.codebook_sizes)
