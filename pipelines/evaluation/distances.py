"""Distances of a set of images from a reference: each with its protocol, floor and warning."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from pipelines.evaluation.metrics import (
    Statistics,
    frechet_distance,
    generation_metrics,
    metric_name,
    metric_settings,
)
from pipelines.evaluation.protocol import Protocol, Results
from pipelines.evaluation.reference import Reference, SavedStatistics, floor_of
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
) -> FeatureOutput:
    """Features of images 0 to `count`, shared by all processes, on the CPU of each."""
    own_items = own_share(accelerator, count)
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

    def features(
        self,
        images_of: Callable[[np.ndarray], UInt8[Tensor, "batch channels height width"]],
        count: int,
        title: str,
    ) -> FeatureOutput:
        """Features of images 0 to `count`."""
        return extract_features(
            self.extractor, images_of, count, self.accelerator, title, self.batch_size
        )

    def features_of(self, images: ImageDataset, items: np.ndarray, title: str) -> FeatureOutput:
        """Features of some items of a data set."""
        return self.features(lambda rows: images.images_at(items[rows]), len(items), title)

    def compare(
        self,
        metric: Literal["FD", "rFD"],
        features: FeatureOutput,
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
        count = min(self.num_images, _size(reference))
        fields: dict[str, Any] = {"reference_hash": reference.fingerprint}
        fields |= {"reference": reference.description, "extractor": self.extractor.protocol}
        if isinstance(reference, SavedStatistics):
            fields["num_reference_images"] = None
            real: FeatureOutput | Statistics = self._checked(reference, features)
        else:
            fields["num_reference_images"] = count
            items = chosen_items(len(reference), count, self.seed)
            real = self.features_of(reference, items, "reference")
        if metric == "FD":
            settings = metric_settings(
                protocol.num_images, None if isinstance(real, Statistics) else count, self.seed
            )
            fields["settings"] = {**settings, **protocol.settings}
            values = generation_metrics(features, real, self.extractor.name, self.seed)
        else:
            target = real.features if isinstance(real, FeatureOutput) else real
            values = {name: frechet_distance(features.features, target)}
        protocol = protocol.model_copy(update=fields)
        results = protocol.attach(values, {name: self._warning(name, features, protocol)})
        return results | self._floor(f"{name} floor", real, reference, other, protocol)

    def _checked(self, reference: SavedStatistics, features: FeatureOutput) -> Statistics:
        expected, found = features.features.shape[1], len(reference.statistics.mean)
        if found != expected:
            raise InputError(
                f"reference: {reference.description} are of {found} features, "
                f"but {self.extractor.name} has {expected}"
            )
        return reference.statistics

    def _floor(
        self,
        name: str,
        real: FeatureOutput | Statistics,
        reference: Reference,
        other: ImageDataset | None,
        protocol: Protocol,
    ) -> Results:
        """Of as many real images on both sides."""
        if isinstance(real, Statistics) or isinstance(reference, SavedStatistics):
            why = "no floor: statistics hold no images"
            return protocol.attach({name: None}, {name: why})
        count = len(real.features)
        floor = floor_of(reference, other, count, self.seed)
        if floor is None:
            return protocol.attach({name: None}, {name: "no floor: too few real images"})
        number = len(floor.items)
        found = self.features_of(floor.images, floor.items, "floor")
        is_part = floor.images is reference
        settings: dict[str, str | int | float] = {
            "images": "another part of the reference" if is_part else floor.images.description,
            "images_hash": floor.images.fingerprint,
        }
        fields = {"num_images": number, "num_reference_images": number, "sampling": {}}
        protocol = protocol.model_copy(update={**fields, "settings": settings})
        note = self._warning(name, found, protocol)
        if number < count:
            fewer = f"of {number:,} images, as there are no more; of {count:,} it would be lower"
            note = "; ".join(filter(None, (fewer, note)))
        distance = frechet_distance(found.features, real.features[:number])
        return protocol.attach({name: distance}, {name: note})

    def _warning(self, name: str, features: FeatureOutput, protocol: Protocol) -> str:
        """Of too few images for a covariance; nothing if there are enough."""
        number = min(protocol.num_images, protocol.num_reference_images or protocol.num_images)
        dim = features.features.shape[1]
        if number > dim:
            return ""
        warning = (
            f"{number:,} images are too few for {dim:,} feature dimensions: the distance is far "
            "above that of many images, and compares with values of the same number alone"
        )
        if self.accelerator.is_main_process:
            logger.warning("%s: %s", name, warning)
        return warning


def _size(reference: Reference) -> int:
    """Of statistics unknown: no limit."""
    return sys.maxsize if isinstance(reference, SavedStatistics) else len(reference)
