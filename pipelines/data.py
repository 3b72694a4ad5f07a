"""Images for training and evaluation, decoded once and read from disk."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pipelines import shapes
from pipelines.checkpoints import check_sources, newest_sources
from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.image_cache import ImageBlock, ImageSource, load_or_store
from pipelines.image_folder import folder_source
from pipelines.torchvision_sets import torchvision_source
from tokenizer.pretrained import InputError

logger = logging.getLogger(__name__)

_SHAPES_PER_BLOCK = 1_000


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


def to_float(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(
    images: Float[Tensor, "batch channels height width"],
) -> UInt8[Tensor, "batch channels height width"]:
    """[-1, 1] to the nearest byte; what lies outside is clipped. Inverts `to_float`."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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


def load_images(config: DataConfig, split: Literal["train", "validation"]) -> ImageDataset:
    """Opens one split, decoding it into `config.cache_dir` if that has not been done before.

    Raises:
        InputError: a parameter, folder or file is unusable; the message names it.
    """
    if config.dataset != "folder" and config.validation_root is not None:
        raise InputError(
            f"data.validation_root must be None where data.dataset is {config.dataset!r}, "
            f"got {config.validation_root}"
        )
    if config.dataset == "shapes" and config.root is not None:
        raise InputError(
            f"data.root must be None where data.dataset is 'shapes', got {config.root}"
        )
    if config.dataset == "shapes":
        source = _shapes_source(config, split)
    elif config.dataset == "folder":
        source = folder_source(config, split)
    else:
        source = torchvision_source(config, split)
    shape = (config.image_size, config.image_size, config.channels)
    images, labels, facts = load_or_store(config.cache_dir, source, shape)
    if facts.unreadable:
        logger.warning(
            "%s: left out %d files that are unreadable, the first is %s; %d images remain",
            facts.description,
            len(facts.unreadable),
            facts.unreadable[0],
            facts.num_images,
        )
    return ImageDataset(
        images=images,
        labels=labels,
        class_names=facts.class_names,
        content_hash=facts.content_hash,
        description=facts.description,
        num_skipped=len(facts.unreadable),
    )


def trained_images(
    run: TokenizerRunConfig, tokenizer_dir: Path, accelerator: Accelerator
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images of the run of stage one that lies in `tokenizer_dir`.

    Raises:
        InputError: they cannot be had, or are others than it was trained on.
    """
    with accelerator.main_process_first():
        train, validation = load_images(run.data, "train"), load_images(run.data, "validation")
    check_sources(tokenizer_dir, newest_sources(tokenizer_dir), image_hashes(train, validation))
    return train, validation


def _shapes_source(config: DataConfig, split: Literal["train", "validation"]) -> ImageSource:
    num_images = config.num_images if split == "train" else config.num_validation_images

    def blocks() -> Iterator[ImageBlock]:
        for start in range(0, num_images, _SHAPES_PER_BLOCK):
            items = np.arange(start, min(start + _SHAPES_PER_BLOCK, num_images), dtype=np.int64)
            images = shapes.draw_shapes(
                config.seed, split, items, config.image_size, config.channels
            )
            yield ImageBlock(images, shapes.shape_labels(items))

    return ImageSource(
        name=f"shapes-{split}",
        description=(
            f"shapes, {split} {num_images} images, seed {config.seed}, drawn at "
            f"{config.image_size}x{config.image_size} with {config.channels} channels"
        ),
        identity={"version": shapes.VERSION},
        produce=lambda: (shapes.CLASS_NAMES, blocks()),
    )
