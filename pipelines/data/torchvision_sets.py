"""Data sets that torchvision knows by name, downloaded on first use."""

import errno
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.config import DataConfig
from pipelines.data.color_profiles import to_srgb
from pipelines.data.conversion import convert_image
from pipelines.data.dataset import Split
from pipelines.data.decoded_images import ImageBlock, ImageSource
from pipelines.data.decoding import VERSION, describe_conversion
from tokenizer.storage.errors import InputError

DEFAULT_ROOT = Path("runs/data")

_IMAGES_PER_BLOCK = 256
_DIGITS = tuple("0123456789")


class NamedSet(NamedTuple):
    """How a data set's parts are called, and where torchvision looks for its files."""

    argument: str
    training: str | bool
    validation: str | bool
    files: str


NAMED_SETS = {
    "CIFAR10": NamedSet("train", True, False, "cifar-10-python.tar.gz"),
    "CIFAR100": NamedSet("train", True, False, "cifar-100-python.tar.gz"),
    "MNIST": NamedSet("train", True, False, "MNIST/raw/*-ubyte.gz"),
    "FashionMNIST": NamedSet("train", True, False, "FashionMNIST/raw/*-ubyte.gz"),
    "SVHN": NamedSet("split", "train", "test", "train_32x32.mat and test_32x32.mat"),
    "STL10": NamedSet("split", "train", "test", "stl10_binary.tar.gz"),
    "Flowers102": NamedSet("split", "train", "val", "flowers-102/*"),
}


def torchvision_source(config: DataConfig, split: Split) -> ImageSource:
    """One split of the set `config.dataset`; its test part is for validation.

    Flowers102 has a validation part of its own, which is taken instead.
    """
    name = config.dataset
    named = NAMED_SETS[name]
    part = named.training if split == "train" else named.validation
    conversion = describe_conversion(config.image_size, config.channels)
    part_name = part if isinstance(part, str) else ("train" if part else "test")

    def produce() -> tuple[tuple[str, ...], Iterator[ImageBlock]]:
        dataset = _open(name, config.root or DEFAULT_ROOT, {named.argument: part})
        class_names = tuple(getattr(dataset, "classes", _DIGITS))  # SVHN names no classes
        return class_names, _convert(dataset, config)

    return ImageSource(
        name=f"{name}-{split}",
        description=f"torchvision {name}, {part_name} part as {split}; {conversion}",
        identity={"version": VERSION},
        produce=produce,
    )


def _open(name: str, root: Path, part: dict[str, str | bool]) -> Any:
    # Takes seconds to import, which the other data sets need not wait for.
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, name)(root=root, download=True, **part)
    except ImportError as error:
        raise InputError(f"data.dataset: {name} cannot be read without {error.name}") from error
    except (OSError, RuntimeError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"data.dataset: {name} could not be downloaded ({reason}); "
            f"put its files where torchvision looks for them: {root / NAMED_SETS[name].files}"
        ) from error


def _convert(dataset: Any, config: DataConfig) -> Iterator[ImageBlock]:
    for start in range(0, len(dataset), _IMAGES_PER_BLOCK):
        rows = range(start, min(start + _IMAGES_PER_BLOCK, len(dataset)))
        images, labels = zip(*(dataset[row] for row in rows), strict=True)
        converted = [
            convert_image(to_srgb(image)[0], config.image_size, config.channels) for image in images
        ]
        yield ImageBlock(np.stack(converted), np.array(labels, dtype=np.int64))
