"""Images for training and evaluation, decoded once and read from disk."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate import Accelerator

from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.data import shapes
from pipelines.data.cache import ImageBlock, ImageSource, load_or_store
from pipelines.data.dataset import ImageDataset, image_hashes
from pipelines.data.folder import folder_source
from pipelines.data.torchvision_sets import torchvision_source
from pipelines.run.checkpoints import check_sources, newest_sources
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_SHAPES_PER_BLOCK = 1_000


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
