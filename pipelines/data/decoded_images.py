"""Images that are decoded once into a cache, then read through a memory map."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import PositiveInt
from torch import Tensor

from pipelines.data.cache import (
    delete_and_start_again,
    open_array,
    open_entry,
    temporary_folder,
    write_entry,
)
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, naming

logger = logging.getLogger(__name__)

_NAMES = "names.json"


class ImageBlock(NamedTuple):
    """Some decoded images, and the files between them that could not be read."""

    images: UInt8[np.ndarray, "items size size channels"]
    labels: Int64[np.ndarray, " items"]
    unreadable: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Of all images of the source, at its end."""
    names: tuple[str, ...] = ()
    """Of the images, if they are files: paths below their folder."""


class ImageMetadata(StrictConfig):
    """What the manifest of a cache entry says of the images."""

    description: str
    """One line: source, split, conversion."""
    class_names: tuple[str, ...]
    """Empty when the images have no classes."""
    num_images: PositiveInt
    """Images kept."""
    unreadable: tuple[str, ...]
    """Files left out, each with the reason."""
    warnings: tuple[str, ...] = ()
    """What else each start has to say."""
    content_hash: str
    """SHA-256 over images, labels and class names."""


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedImages:
    """An `ImageDataset` over decoded images, all of one size."""

    images: UInt8[np.ndarray, "items height width channels"]
    """A read-only memory map."""
    labels: Int64[np.ndarray, " items"]
    class_names: tuple[str, ...]
    fingerprint: str
    description: str
    folder: Path | None = None
    """Of the cache, if they lie there."""
    reading: ClassVar[str] = "decoded once, read from a memory map"
    """For people."""

    def item_names(self) -> list[str]:
        """Paths of the images below their folder, by which what belongs to them is found.

        Raises:
            InputError: they are no files, or an earlier version has stored them without names.
        """
        if self.folder is None:
            raise InputError(f"{self.description}: the images have no file names")
        with delete_and_start_again(self.folder):
            path = self.folder / _NAMES
            if not path.exists():
                raise InputError(f"{self.description}: the images were stored without file names")
            names: list[str] = json.loads(path.read_bytes())
            return names

    def __len__(self) -> int:
        return len(self.images)

    def images_at(
        self, item_indices: Int64[np.ndarray, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """The chosen images, in the given order, as a copy."""
        return torch.from_numpy(self.images[item_indices]).permute(0, 3, 1, 2).contiguous()


class ImageSource(NamedTuple):
    """Images that can be produced, and everything that determines them."""

    name: str
    """Starts the folder's name, for people."""
    description: str
    """One line, part of the identity."""
    identity: Mapping[str, object]
    """JSON values; another identity is another cache entry."""
    produce: Callable[[], tuple[tuple[str, ...], Iterable[ImageBlock]]]
    """Class names, and the images, of which there must be at least one."""


def load_or_store(
    cache_dir: Path, source: ImageSource, shape: tuple[int, int, int]
) -> DecodedImages:
    """Opens the images of `source`, each of `shape`, producing and storing them the first time.

    Any number of processes may do so at once: each entry appears atomically, and the first wins.
    What `source` had to leave out is logged.

    Raises:
        InputError: `cache_dir` cannot be written, or an entry in it is damaged.
    """
    identity = json.dumps([source.description, shape, source.identity], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:20]
    folder = cache_dir / f"{source.name}-{key}"
    if not folder.exists():
        with temporary_folder(folder) as temporary:
            with naming(folder):
                _store(temporary, source, shape)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                logger.info("%s was stored by another process meanwhile", folder)
            flush_to_disk(cache_dir)
    return _open(folder, shape)


def write_header(file: BinaryIO, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """An .npy header; numpy pads it so that its length is the same for any number of rows."""
    descriptor = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descriptor, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _store(folder: Path, source: ImageSource, shape: tuple[int, int, int]) -> None:
    """Writes with plain writes: through a memory map, a full disk would kill the process."""
    digest = hashlib.sha256()
    labels: list[Int64[np.ndarray, " items"]] = []
    unreadable: list[str] = []
    warnings: list[str] = []
    names: list[str] = []
    num_images = 0
    class_names, blocks = source.produce()
    with (folder / "images.npy").open("wb") as file:
        write_header(file, np.uint8, (0, *shape))
        start = file.tell()
        for block in blocks:
            content = np.ascontiguousarray(block.images).tobytes()
            file.write(content)
            digest.update(content)
            labels.append(block.labels)
            unreadable.extend(block.unreadable)
            warnings.extend(block.warnings)
            names.extend(block.names)
            num_images += len(block.images)
        file.seek(0)
        write_header(file, np.uint8, (num_images, *shape))
        assert file.tell() == start
    all_labels = np.concatenate(labels).astype("<i8").tobytes()
    with (folder / "labels.npy").open("wb") as file:
        write_header(file, np.int64, (num_images,))
        file.write(all_labels)
    if names:
        (folder / _NAMES).write_text(json.dumps(names))
    digest.update(all_labels)
    digest.update(json.dumps([num_images, *shape, *class_names]).encode())
    metadata = ImageMetadata(
        description=source.description,
        class_names=class_names,
        num_images=num_images,
        unreadable=tuple(unreadable),
        warnings=tuple(warnings),
        content_hash=digest.hexdigest(),
    )
    write_entry(folder, metadata.model_dump(mode="json"))


def _open(folder: Path, shape: tuple[int, int, int]) -> DecodedImages:
    with delete_and_start_again(folder):
        manifest = open_entry(folder)
        fields = {name: manifest[name] for name in ImageMetadata.model_fields if name in manifest}
        metadata = ImageMetadata.model_validate_json(json.dumps(fields))
        labels = open_array(folder / "labels.npy", np.int64, (metadata.num_images,))
        images = open_array(folder / "images.npy", np.uint8, (metadata.num_images, *shape))
    if metadata.unreadable:
        logger.warning(
            "%s: left out %d files that are unreadable, the first is %s; %d images remain",
            metadata.description,
            len(metadata.unreadable),
            metadata.unreadable[0],
            metadata.num_images,
        )
    for warning in metadata.warnings:
        logger.warning("%s: %s", metadata.description, warning)
    return DecodedImages(
        images=images,
        labels=np.array(labels),
        class_names=metadata.class_names,
        fingerprint=metadata.content_hash,
        description=metadata.description,
        folder=folder,
    )
