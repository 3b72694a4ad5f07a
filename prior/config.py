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
    dropout: ProperShare = 0.1
    """Dropout of attention and feed-forward layers."""
    label_dropout: ProperShare = 0.1
    """Share of training images whose label is hidden, for guidance; unused without classes."""

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


class PriorConfig(StrictConfig):
    """A prior over the codes of one tokenizer at one image size."""

    network: PriorNetworkConfig = PriorNetworkConfig()
    code_maps: Annotated[tuple[CodeMapConfig, ...], Field(min_length=1, max_length=16)]
    """Shapes of the code indices, coarse to fine."""
    num_classes: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of classes; 0 = none."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, by number; empty where it is not known."""
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
