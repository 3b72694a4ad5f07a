"""Parameters of the prior."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from pydantic import model_validator as validates

from tokenizer.config import CodeMapConfig
from tokenizer.fields import Depth, ProperShare, Width
from tokenizer.storage.configs import StrictConfig

MAX_GUIDANCE = 1e3
MAX_NAMES = 2**19
"""Characters of all class names together."""
WeightT = TypeVar("WeightT")
Order = Literal["coarse_to_fine", "cell"]


class PriorNetworkConfig(StrictConfig):
    """Spatial and depth transformers over code indices (RQ-Transformer, arXiv 2203.01941)."""

    width: Width = 256
    """Channels of both transformers."""
    num_spatial_layers: Depth = 6
    """Layers of the spatial transformer, over the steps."""
    num_depth_layers: Depth = 2
    """Layers of the depth transformer, over the codes within a step."""
    num_heads: Width = 8
    """Attention heads; width must be a multiple of it."""
    order: Order = "cell"
    """One step per position of every map (coarse_to_fine) or of the coarsest map (cell)."""
    positions: Literal["learned", "rotary", "rotary_only"] = "learned"
    """One learned vector per step (learned), and 2-D rotary embeddings over row and column beside
    it (rotary). rotary_only, of earlier priors, tells distances but not where a step lies."""
    value_residual: bool = False
    """Later layers mix the first one's values into their own, by a share that depends on input and
    head (arXiv 2410.17897)."""
    adaptive_norm: bool = False
    """The condition's vector, if it has one, also scales the channels behind every norm (adaptive
    normalization, as in arXiv 2404.02905)."""
    dropout: ProperShare = 0.1
    """Dropout of attention and feed-forward layers."""
    label_dropout: ProperShare = 0.1
    """Share of training images whose class or other condition is hidden, for guidance."""

    @validates(mode="after")
    def _check(self) -> "PriorNetworkConfig":
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        head_dim = self.width // self.num_heads
        if self.positions != "learned" and head_dim % 4:
            raise ValueError(
                f"width / num_heads must be a multiple of 4 for rotary positions, got {head_dim}"
            )
        return self


def upgrade_network(fields: dict[str, Any], version: int) -> dict[str, Any]:
    """Fields of a `PriorNetworkConfig` that format `version` saved, as they are called today."""
    if version == 1:
        names = {"body_depth": "num_spatial_layers", "head_depth": "num_depth_layers"}
        fields = {names.get(name, name): value for name, value in fields.items()}
    if version < 3 and fields.get("positions") == "rotary":
        fields = {**fields, "positions": "rotary_only"}
    return fields


MODULES_OF_FORMAT_1 = {
    "body": "spatial_transformer",
    "head": "depth_transformer",
    "class_embedding": "conditioner.embedding",
}


def upgrade_names(weights: dict[str, WeightT]) -> dict[str, WeightT]:
    """Weights that format 1 saved, as they are called today."""
    return {
        ".".join([MODULES_OF_FORMAT_1.get(first, first), *rest]): weight
        for (first, *rest), weight in (
            (name.split("."), weight) for name, weight in weights.items()
        )
    }


class TextEncoderConfig(StrictConfig):
    """What made tokens of texts."""

    source: str = ""
    """Local folder or name on the Hugging Face hub; empty for an encoder of the user's."""
    content_hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of its weights and vocabulary, so that another one is not taken for it."""


class EmbeddingConditionConfig(StrictConfig):
    """What any encoder gives: one vector per image, or several tokens."""

    kind: Literal["embeddings"] = "embeddings"
    dim: Annotated[int, Field(gt=0, le=2**16)]
    """Channels."""
    num_tokens: Annotated[int, Field(ge=0, le=1024)] = 0
    """Tokens of an image, at most; 0 = one vector."""
    text_encoder: TextEncoderConfig | None = None
    """Where the tokens are of texts."""


class AttributeConfig(StrictConfig):
    """A property of an image, such as its color."""

    name: Annotated[str, Field(min_length=1)]
    values: Annotated[tuple[str, ...], Field(min_length=1)]
    """What it may be; an image may have several of them."""

    @validates(mode="after")
    def _check(self) -> "AttributeConfig":
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"values must differ, got one of {self.name!r} twice")
        return self


class AttributeConditionConfig(StrictConfig):
    """Several labels at once, any of which may be left open."""

    kind: Literal["attributes"] = "attributes"
    attributes: Annotated[tuple[AttributeConfig, ...], Field(min_length=1)]

    @validates(mode="after")
    def _check(self) -> "AttributeConditionConfig":
        names = [attribute.name for attribute in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attributes must differ in their names, got {', '.join(names)}")
        texts = [*names, *(value for own in self.attributes for value in own.values)]
        if sum(map(len, texts)) > MAX_NAMES:
            raise ValueError(f"attributes must have at most {MAX_NAMES} characters in all")
        return self

    @property
    def num_values(self) -> int:
        """Values of all attributes together."""
        return sum(len(attribute.values) for attribute in self.attributes)


ConditionConfig = Annotated[
    EmbeddingConditionConfig | AttributeConditionConfig, Field(discriminator="kind")
]


class PriorConfig(StrictConfig):
    """A prior over the codes of one tokenizer at one image size."""

    network: PriorNetworkConfig = PriorNetworkConfig()
    code_maps: Annotated[tuple[CodeMapConfig, ...], Field(min_length=1, max_length=16)]
    """Shapes of the code indices, coarse to fine."""
    num_classes: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of classes; 0 = none."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, by number; empty where it is not known."""
    condition: ConditionConfig | None = None
    """What it is conditioned on in place of classes."""
    has_custom_conditioner: bool = False
    """The prior is built with a `Conditioner` of the user's, which is needed to load it."""
    tokenizer_hash: Annotated[str, Field(pattern="^[0-9a-f]{0,64}$")] = ""
    """Content hash of the tokenizer whose codes are modelled."""

    @validates(mode="after")
    def _check(self) -> "PriorConfig":
        if self.has_custom_conditioner and self.num_classes:
            raise ValueError(
                f"num_classes must be 0 with has_custom_conditioner, got {self.num_classes}"
            )
        if self.condition is not None and (self.num_classes or self.has_custom_conditioner):
            raise ValueError("condition must be None with num_classes or has_custom_conditioner")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must hold {self.num_classes} names, got {len(self.class_names)}"
            )
        if sum(map(len, self.class_names)) > MAX_NAMES:  # config.json would not be read again
            raise ValueError(f"class_names must have at most {MAX_NAMES} characters in all")
        return self

    @property
    def codebook_sizes(self) -> list[int]:
        """Number of codes of every layer over all groups, coarse to fine."""
        return [size for code_map in self.code_maps for size in code_map.codebook_sizes]
