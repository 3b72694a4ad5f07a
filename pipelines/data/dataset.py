"""What training and evaluation need to know of a set of images."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Decoded images of one size, in memory or a read-only memory map."""

    images: UInt8[np.ndarray, "items height width channels"]
    labels: Int64[np.ndarray, " items"]
    """Class indices; zeros without classes."""
    class_names: tuple[str, ...]
    """Empty without classes."""
    content_hash: str
    """SHA-256 over images, labels and class names, wherever they lie."""
    description: str
    """One line: source, split, resize and crop."""
    num_skipped: int
    """Unreadable files that were left out."""

    def __len__(self) -> int:
        return len(self.images)

    def images_at(
        self, item_indices: Int64[np.ndarray, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """The chosen images, in the given order, as a copy."""
        return torch.from_numpy(self.images[item_indices]).permute(0, 3, 1, 2).contiguous()


def image_hashes(train: ImageDataset, validation: ImageDataset) -> dict[str, str]:
    """What a run learns from, by name and content."""
    return {
        "training images": train.content_hash,
        "validation images": validation.content_hash,
    }


def chosen_items(num_items: int, count: int, seed: int = 0) -> Int64[np.ndarray, " chosen"]:
    """At most `count` of the items, a seeded choice: folders are sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator)[:count].numpy()
