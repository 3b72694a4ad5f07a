"""Parameters of the tokenizer."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic import model_validator as validates

from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.fields import (
    CodebookSizes,
    Depth,
    Downsampling,
    Factor,
    GridLevels,
    MapSide,
    Mean,
    PositiveFactor,
    Share,
    Width,
)
from tokenizer.storage.configs import StrictConfig


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
    head_width: Annotated[int, Field(ge=0, le=2**10)] = 0
    """Channels of convolutions at full resolution behind the decoder's patches; 0 = none."""


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


class StochasticQuantizerConfig(StrictConfig):
    """Stochastic quantization (SQ-VAE, arXiv 2205.07547)."""

    has_posterior: ClassVar[bool] = True
    kind: Literal["stochastic"] = "stochastic"
    variance_factor: PositiveFactor = 5.0
    """Initial variance s² of a layer, in units of its inputs' variance per dimension."""
    noise_factor: Factor = 0.2
    """Variance of the noise on the initial code vectors, in the same units."""


class NearestQuantizerConfig(StrictConfig):
    """Deterministic baselines: nearest code, straight-through gradient, EMA codebooks.

    Sources: VQ-VAE (arXiv 1711.00937), VQ-VAE-2 (arXiv 1906.00446), RQ-VAE (arXiv 2203.01941).
    """

    has_posterior: ClassVar[bool] = False
    kind: Literal["nearest"] = "nearest"
    starts_from_data: bool = True
    """Draw the initial code vectors from encoder outputs, not from N(0, 1)."""
    decay: Share = 0.99
    """Decay of the exponential moving averages."""
    restart_threshold: Factor = 1.0
    """A code whose average count falls below this is replaced by an encoder output; 0 = never."""


class FiniteScalarQuantizerConfig(StrictConfig):
    """Finite scalar quantization (FSQ, arXiv 2309.15505)."""

    has_posterior: ClassVar[bool] = False
    kind: Literal["fsq"] = "fsq"
    levels: GridLevels = (8, 8, 4)
    """Values per dimension of the grid; their product is the codebook size of every layer."""


class CustomQuantizerConfig(StrictConfig):
    """A quantizer from outside the package; what builds it is given in Python."""

    has_posterior: ClassVar[bool] = False
    kind: Literal["custom"] = "custom"
    name: str
    """What it is called, for people."""


QuantizerConfig = Annotated[
    StochasticQuantizerConfig
    | NearestQuantizerConfig
    | FiniteScalarQuantizerConfig
    | CustomQuantizerConfig,
    Field(discriminator="kind"),
]


class PreprocessingConfig(StrictConfig):
    """How training made images of pictures of any size, so that others are made alike."""

    image_size: MapSide
    """Side in pixels: the shorter side is resized to it, then the center is cropped."""
    white_value: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """Value of a 16-bit picture that is white; None: the highest."""


class TokenizerConfig(StrictConfig):
    """A hierarchical tokenizer: SQ-VAE-2, RSQ-VAE, a hybrid, or a deterministic baseline."""

    groups: Annotated[tuple[GroupConfig, ...], Field(min_length=1, max_length=16)]
    """Resolution groups, coarse to fine."""
    quantizer: QuantizerConfig = StochasticQuantizerConfig()
    networks: NetworkConfig = NetworkConfig()
    backbone: BackboneConfig | None = None
    """A timm model in place of the residual bottom-up path."""
    code_prior: CodePriorConfig = CodePriorConfig()
    """Inside the tokenizer: how likely codes are."""
    channels: Annotated[int, Field(ge=1, le=4)] = 3
    """Image channels."""
    preprocessing: PreprocessingConfig | None = None
    """Of the training images; training fills it. None in what earlier versions saved."""
    loss_networks: Annotated[
        tuple[Annotated[str, Field(pattern=r"^\S{1,100} [0-9a-f]{64}$")], ...],
        Field(max_length=16),
    ] = ()
    """NAME SHA256 of the networks whose features the training compared; training fills it. They
    must not judge the tokenizer."""

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

    def with_custom_quantizer(self, build: object) -> "TokenizerConfig":
        """The same, but that quantizers come from outside the package."""
        name = getattr(build, "__qualname__", type(build).__qualname__)
        return self.model_copy(update={"quantizer": CustomQuantizerConfig(name=name)})

    @property
    def has_posterior(self) -> bool:
        """Whether the quantizer has a distribution over codes; unknown of a custom one."""
        return self.quantizer.has_posterior


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


RECIPE_OF_VERSION_1 = {
    "initial_temperature",
    "final_temperature",
    "temperature_hold",
    "latent_weight",
    "codebook_rate",
    "variance_rate",
    "commitment_weight",
}
"""Fields of the quantizer that the stage's recipe holds since."""


def without_recipe(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a tokenizer saved in format 1, which kept the recipe with the quantizer."""
    quantizer = fields.get("quantizer")
    if not isinstance(quantizer, dict):
        return fields
    kept = {key: value for key, value in quantizer.items() if key not in RECIPE_OF_VERSION_1}
    return {**fields, "quantizer": kept}
