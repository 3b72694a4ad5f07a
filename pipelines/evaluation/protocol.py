"""How a number came about."""

from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from tokenizer.storage.configs import StrictConfig

Results = dict[str, dict[str, Any]]
"""By metric name: value, protocol and, where there is something to say, a note."""


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("timm", "torch", "torch-fidelity", "torchvision")
    return {name: version(name) for name in names}


class Protocol(StrictConfig):
    """How a number came about: two numbers compare only where these agree."""

    reference: str
    """Description of the images compared with: source, split, resize and crop."""
    reference_hash: str
    """SHA-256 of those images."""
    num_reference_images: PositiveInt | None
    """Of them used; None where statistics do not say."""
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

    def attach(
        self,
        values: Mapping[str, float | list[float] | None],
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> Results:
        """Each number with this protocol beside it, ready for JSON.

        Args:
            values: by name; None where a number cannot be had.
            notes: by the same names, a warning, or why there is no number; empty is none.
        """
        protocol = self.model_dump(mode="json")
        entries: Results = {}
        for name, value in values.items():
            entries[name] = {"value": value, "protocol": protocol}
            if notes.get(name):
                entries[name]["note"] = notes[name]
        return entries


def compared_numbers(protocol: Mapping[str, Any]) -> str:
    """How many images a number is of: "1,000", or "1,000 against 198"."""
    count, reference = protocol["num_images"], protocol["num_reference_images"]
    if reference is None:
        return f"{count:,} against statistics"
    return f"{count:,}" if count == reference else f"{count:,} against {reference:,}"
