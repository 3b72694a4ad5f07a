"""What training and evaluation need to know of a set of images."""

from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

Split = Literal["train", "validation"]


@runtime_checkable
class ImageDataset(Protocol):
    """Images of one size, each of which can be had at any time: the data order needs no state."""

    @property
    def labels(self) -> Int64[np.ndarray, " items"]:
        """Class indices; zeros without classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty without classes."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content, wherever it lies: a run goes on, and is measured, with this one."""

    @property
    def description(self) -> str:
        """One line that names source, split and conversion."""

    def __len__(self) -> int:
        """Number of images; at least one."""

    def images_at(
        self, item_indices: Int64[np.ndarray, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """The chosen images, in the given order, as a copy; called from several threads."""


def image_shape(dataset: ImageDataset) -> tuple[int, int, int]:
    """Channels, height and width."""
    channels, height, width = dataset.images_at(np.zeros(1, np.int64)).shape[1:]
    return channels, height, width


def describe_images(train: ImageDataset, validation: ImageDataset) -> str:
    """Numbers, shape and how they are read, for people."""
    channels, height, width = image_shape(train)
    reading = f"; {train.reading}" if hasattr(train, "reading") else ""
    number = len(train.class_names)
    classes = f" in {number:,} class{'es' * (number != 1)}" if number else ""
    return (
        f"{len(train):,} images of {width}×{height}×{channels}{classes}, "
        f"{len(validation):,} for validation{reading}"
    )


def image_hashes(train: ImageDataset, validation: ImageDataset) -> dict[str, str]:
    """What a run learns from, by name and content."""
    return {
        "training images": train.fingerprint,
        "validation images": validation.fingerprint,
    }


def chosen_items(num_items: int, count: int, seed: int = 0) -> Int64[np.ndarray, " chosen"]:
    """At most `count` of the items, a seeded choice: folders are sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator)[:count].numpy()
