"""How a number came about."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from tokenizer.storage.configs import StrictConfig


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("timm", "torch", "torch-fidelity", "torchmetrics", "torchvision")
    return {name: version(name) for name in names}


class Protocol(StrictConfig):
    """How a number came about: two numbers compare only where these agree."""

    reference: str
    """Description of the images compared with: source, split, resize and crop."""
    reference_hash: str
    """SHA-256 of those images."""
    num_reference_images: PositiveInt
    """Of them used."""
    num_images: PositiveInt
    """Generated or reconstructed images."""
    seed: NonNegativeInt
    """Seed of the generated images."""
    extractor: dict[str, str | int | float] = Field(default_factory=dict)
    """`FeatureExtractor.protocol`; empty where none is used."""
    sampling: dict[str, JsonValue] = Field(default_factory=dict)
    """Temperature, top-k, top-p, guidance and so on; empty for reconstructions."""
    settings: dict[str, str | int | float] = Field(default_factory=dict)
    """`metric_settings`, or anything else that the numbers depend on."""
    versions: dict[str, str] = Field(default_factory=library_versions)
    """Of the libraries."""

    def attach(self, values: Mapping[str, float | list[float]]) -> dict[str, dict[str, Any]]:
        """Each number with this protocol beside it, ready for JSON."""
        protocol = self.model_dump(mode="json")
        return {name: {"value": value, "protocol": protocol} for name, value in values.items()}
