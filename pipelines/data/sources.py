"""Images for training and evaluation, by the name of their source."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator

from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.data import shapes
from pipelines.data.dataset import ImageDataset, Split, image_hashes
from pipelines.data.decoded_images import ImageBlock, ImageSource, load_or_store
from pipelines.data.files import open_files
from pipelines.data.folder import folder_source, whole_folder_source
from pipelines.data.folder_scan import printable
from pipelines.data.hugging_face import open_table
from pipelines.data.shards import open_shards
from pipelines.data.torchvision_sets import NAMED_SETS, torchvision_source
from pipelines.data_config import ReadingConfig
from pipelines.run.checkpoints import check_sources, newest_sources
from tokenizer.storage.errors import InputError

_SHAPES_PER_BLOCK = 1_000


class DataSource(NamedTuple):
    """A row of the table of sources."""

    open: Callable[[DataConfig, Split], ImageDataset]
    unused: tuple[str, ...]
    """Fields of `DataConfig` that must be None."""
    is_decoded_once: bool = True
    """Whether the images lie decoded in `cache_dir`; others take `DataConfig.reading`."""


def load_images(config: DataConfig, split: Split) -> ImageDataset:
    """Opens one split of the source `config.dataset`.

    Raises:
        InputError: a parameter, folder or file is unusable; the message names it.
    """
    source = SOURCES[config.dataset]
    for field in source.unused:
        if getattr(config, field) is not None:
            raise InputError(
                f"data.{field} must be None where data.dataset is {config.dataset!r}, "
                f"got {printable(getattr(config, field))}"
            )
    if source.is_decoded_once and config.reading != ReadingConfig():
        raise InputError(
            "data.reading applies to images that are decoded each time, data.dataset 'files', "
            f"'datasets' or 'shards', alone, got {config.dataset!r}"
        )
    return source.open(config, split)


def load_splits(config: DataConfig, accelerator: Accelerator) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; the main process decodes what the others then open.

    Raises:
        InputError: as `load_images`.
    """
    with accelerator.main_process_first():
        return load_images(config, "train"), load_images(config, "validation")


def load_folder(
    config: DataConfig, root: Path, field: str, accelerator: Accelerator
) -> ImageDataset:
    """All images of another folder, decoded as those of `config` are.

    Raises:
        InputError: a folder or file is unusable; `field` names the folder.
    """
    shape = (config.image_size, config.image_size, config.channels)
    with accelerator.main_process_first():
        return load_or_store(config.cache_dir, whole_folder_source(config, root, field), shape)


def trained_images(
    run: TokenizerRunConfig,
    tokenizer_dir: Path,
    accelerator: Accelerator,
    images: tuple[ImageDataset, ImageDataset] | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images of the run of stage one that lies in `tokenizer_dir`.

    Args:
        run: its config.
        tokenizer_dir: its folder.
        accelerator: the processes that open the images.
        images: those of a source that `run.data` cannot name.

    Raises:
        InputError: they cannot be had, or are others than it was trained on.
    """
    train, validation = images or load_splits(run.data, accelerator)
    check_sources(tokenizer_dir, newest_sources(tokenizer_dir), image_hashes(train, validation))
    return train, validation


def _decoded(
    source_of: Callable[[DataConfig, Split], ImageSource],
) -> Callable[[DataConfig, Split], ImageDataset]:
    """Opens images that are decoded into `config.cache_dir` the first time."""

    def open_images(config: DataConfig, split: Split) -> ImageDataset:
        shape = (config.image_size, config.image_size, config.channels)
        return load_or_store(config.cache_dir, source_of(config, split), shape)

    return open_images


def _shapes_source(config: DataConfig, split: Split) -> ImageSource:
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


SOURCES: Mapping[str, DataSource] = {
    "shapes": DataSource(
        _decoded(_shapes_source), unused=("validation_root", "root", "white_value")
    ),
    "folder": DataSource(_decoded(folder_source), unused=()),
    "files": DataSource(open_files, unused=(), is_decoded_once=False),
    "datasets": DataSource(open_table, unused=(), is_decoded_once=False),
    "shards": DataSource(open_shards, unused=(), is_decoded_once=False),
    **dict.fromkeys(
        NAMED_SETS,
        DataSource(_decoded(torchvision_source), unused=("validation_root", "white_value")),
    ),
}
"""By `DataConfig.dataset`."""
