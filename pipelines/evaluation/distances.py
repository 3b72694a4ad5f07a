"""Distances of a set of images from a reference: each with its protocol, floor and warning."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.feature_shares import (
    IN_MEMORY,
    Features,
    FeatureStore,
    stored_features,
)
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from pipelines.evaluation.metrics import (
    frechet_distance,
    generation_metrics,
    metric_name,
    metric_settings,
)
from pipelines.evaluation.protocol import Protocol, Results, library_versions
from pipelines.evaluation.reference import (
    Reference,
    SavedStatistics,
    cached_statistics,
    floor_of,
)
from pipelines.evaluation.streaming import Statistics, fit_gaussian
from pipelines.processes import bar_disabled, gather_shares, own_share
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)


def extract_features(
    extractor: FeatureExtractor,
    images_of: Callable[[np.ndarray], UInt8[Tensor, "batch channels height width"]],
    count: int,
    accelerator: Accelerator,
    title: str,
    batch_size: int,
    first: int = 0,
) -> FeatureOutput:
    """Features of `count` images from `first` on, shared by all processes, on the CPU of each."""
    own_items = first + own_share(accelerator, count)
    outputs = []
    starts = range(0, len(own_items), batch_size)
    for start in tqdm(starts, title, disable=bar_disabled(accelerator), leave=False):
        images = images_of(own_items[start : start + batch_size])
        outputs.append(extractor(images.to(accelerator.device)))
    if not outputs:  # more processes than images
        outputs.append(extractor(images_of(np.arange(1)).to(accelerator.device)))
        outputs[0] = FeatureOutput(*(rows[:0] for rows in outputs[0]))
    columns = (torch.cat(rows) for rows in zip(*outputs, strict=True))
    return FeatureOutput(*(gather_shares(accelerator, rows, count) for rows in columns))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares images with real ones by the features of one network."""

    extractor: FeatureExtractor
    accelerator: Accelerator
    batch_size: int
    """Images at a time."""
    num_images: int
    """Of a reference, at most as many as it has."""
    seed: int
    """Of the choice of images."""
    store: FeatureStore = IN_MEMORY
    """Where features and statistics are kept."""

    def features(
        self,
        images_of: Callable[[np.ndarray], UInt8[Tensor, "batch channels height width"]],
        count: int,
        title: str,
        identity: Mapping[str, Any] | None = None,
    ) -> Features:
        """Features of images 0 to `count`, in the store if `identity` says which images they are.

        Args:
            images_of: the images of these numbers.
            count: number of images.
            title: of the bar.
            identity: JSON values, of all that the images depend on beside their numbers.
        """

        def extract(first: int, number: int, shown: str) -> FeatureOutput:
            options = (self.accelerator, shown, self.batch_size, first)
            return extract_features(self.extractor, images_of, number, *options)

        if self.store.shares is None or identity is None:
            return extract(0, count, title)
        known = self._identity(identity)
        return stored_features(self.store.shares, known, count, extract, self.accelerator, title)

    def features_of(self, images: ImageDataset, items: np.ndarray, title: str) -> Features:
        """Features of some items of a data set."""

        def images_of(rows: np.ndarray) -> Tensor:
            return images.images_at(items[rows])

        return self.features(images_of, len(items), title, _identity_of(images, items))

    def _chosen(self, images: ImageDataset, items: np.ndarray, title: str) -> "_RealImages":
        extract = functools.partial(self.features_of, images, items, title)
        return _RealImages(images, items, functools.cache(extract))

    def _statistics_of(self, real: "_RealImages") -> Statistics:
        """From the cache, if there is one."""

        def compute() -> Statistics:
            return fit_gaussian(real.features().features, len(real.items))

        if self.store.statistics is None:
            return compute()
        identity = self._identity(_identity_of(real.images, real.items))
        return cached_statistics(self.store.statistics, identity, compute, self.accelerator)

    def _identity(self, of_images: Mapping[str, Any]) -> dict[str, Any]:
        """Of features: other devices draw other random numbers."""
        return {
            **of_images,
            "extractor": self.extractor.protocol,
            "device": self.accelerator.device.type,
            "versions": library_versions(),
        }

    def compare(
        self,
        metric: Literal["FD", "rFD"],
        features: Features,
        reference: Reference,
        other: ImageDataset | None,
        protocol: Protocol,
    ) -> Results:
        """The Fréchet distance and its floor; with "FD" the other metrics of generation, too.

        Args:
            metric: "FD" of generated images, or "rFD" of reconstructions.
            features: of the images that are compared.
            reference: what they are compared with.
            other: more real images, for the floor; None if there are no others.
            protocol: of the images that are compared.

        Raises:
            InputError: too few images on a side, or statistics of other features.
        """
        name = metric_name(metric, self.extractor.name)
        dim = features.features.shape[1]
        fields: dict[str, Any] = {"reference_hash": reference.fingerprint}
        fields |= {"reference": reference.description, "extractor": self.extractor.protocol}
        if isinstance(reference, SavedStatistics):
            real, count = None, None
            statistics = self._checked(reference, dim)
        else:
            items = chosen_items(len(reference), self.num_images, self.seed)
            real = self._chosen(reference, items, "reference")
            count, statistics = len(real.items), self._statistics_of(real)
        fields["num_reference_images"] = count
        if metric == "FD":
            settings = metric_settings(protocol.num_images, count, self.seed)
            fields["settings"] = {**settings, **protocol.settings}
            target = statistics if real is None else real.features()
            values = generation_metrics(
                features, target, self.extractor.name, self.seed, statistics
            )
        else:
            values = {name: frechet_distance(features.features, statistics)}
        protocol = protocol.model_copy(update=fields)
        results = protocol.attach(values, {name: self._warning(name, dim, protocol)})
        return results | self._floor(f"{name} floor", real, statistics, other, protocol)

    def _checked(self, reference: SavedStatistics, expected: int) -> Statistics:
        found = len(reference.statistics.mean)
        if found != expected:
            raise InputError(
                f"reference: {reference.description} are of {found} features, "
                f"but {self.extractor.name} has {expected}"
            )
        return reference.statistics

    def _floor(
        self,
        name: str,
        real: "_RealImages | None",
        statistics: Statistics,
        other: ImageDataset | None,
        protocol: Protocol,
    ) -> Results:
        """Of as many real images on both sides."""
        if real is None:
            why = "no floor: statistics hold no images"
            return protocol.attach({name: None}, {name: why})
        reference, count = real.images, len(real.items)
        floor = floor_of(reference, other, count, self.seed)
        if floor is None:
            return protocol.attach({name: None}, {name: "no floor: too few real images"})
        number = len(floor.items)
        found = self._statistics_of(self._chosen(floor.images, floor.items, "floor"))
        is_part = floor.images is reference
        settings: dict[str, str | int | float] = {
            "images": "another part of the reference" if is_part else floor.images.description,
            "images_hash": floor.images.fingerprint,
        }
        fields = {"num_images": number, "num_reference_images": number, "sampling": {}}
        protocol = protocol.model_copy(update={**fields, "settings": settings})
        note = self._warning(name, len(found.mean), protocol)
        if number < count:
            fewer = f"of {number:,} images, as there are no more; of {count:,} it would be lower"
            note = "; ".join(filter(None, (fewer, note)))
            statistics = self._statistics_of(real._replace(items=real.items[:number]))
        distance = frechet_distance(found, statistics)
        return protocol.attach({name: distance}, {name: note})

    def _warning(self, name: str, dim: int, protocol: Protocol) -> str:
        """Of too few images for a covariance; nothing if there are enough."""
        number = min(protocol.num_images, protocol.num_reference_images or protocol.num_images)
        if number > dim:
            return ""
        warning = (
            f"{number:,} images are too few for {dim:,} feature dimensions: the distance is far "
            "above that of many images, and compares with values of the same number alone"
        )
        if self.accelerator.is_main_process:
            logger.warning("%s: %s", name, warning)
        return warning


class _RealImages(NamedTuple):
    """Items of a data set; what needs their features asks for them."""

    images: ImageDataset
    items: np.ndarray
    features: Callable[[], Features]
    """Of these items, or of more from the first on."""


def _identity_of(images: ImageDataset, items: np.ndarray) -> dict[str, str]:
    """Of some images of a data set."""
    digest = hashlib.sha256(items.astype(np.int64).tobytes()).hexdigest()
    return {"images": images.fingerprint, "items": digest}
