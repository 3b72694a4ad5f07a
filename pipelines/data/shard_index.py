"""Where each image of some tar shards lies: an index that is made once, then memory-mapped.

The files of one sample share their name up to its first dot, as webdataset has it; what follows is
the field: `0001.jpg`, `0001.cls`, `0001.txt`.
"""

import hashlib
import io
import logging
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipelines.data.cache import temporary_folder, write_entry
from pipelines.data.folder_listing import number_first
from pipelines.data.folder_scan import printable
from pipelines.data.formats import FORMAT_OF_SUFFIX
from pipelines.data.name_table import NewNames
from pipelines.data.remote import RangeFile, find_files, is_remote
from pipelines.index_config import IndexShardsConfig
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 2**20
_MOST_LABEL_BYTES = 1_000
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Place(NamedTuple):
    """Where a file lies in its shard."""

    offset: int
    size: int


class Indexed(NamedTuple):
    """What an index came to."""

    num_images: int
    num_shards: int
    class_names: tuple[str, ...]
    left_out: tuple[str, ...]
    """Samples and shards, each with the reason."""


def index_shards(config: IndexShardsConfig) -> Indexed:
    """Reads the headers of all shards and writes the index to `config.output_dir`.

    Raises:
        InputError: no shards, nothing in them, or something damaged that is not to be skipped.
    """
    addresses = shard_addresses(config.shards)
    if config.output_dir.exists():
        raise InputError(f"output_dir: {config.output_dir} exists already; move it away")
    rows = _Rows(config)
    for number, address in enumerate(tqdm(addresses, "shards", leave=False, disable=None)):
        rows.add_shard(number, address)
    if not rows.shards:
        first = f", the first {rows.left_out[0]}" if rows.left_out else ""
        raise InputError(f"SHARDS: {config.shards} hold no images{first}")
    class_names = tuple(sorted(rows.classes, key=number_first))
    label_of = {rows.classes[name]: label for label, name in enumerate(class_names)}
    labels = np.array([label_of[number] for number in range(len(label_of))] or [0], np.int64)
    labels = labels[np.array(rows.labels)]
    with temporary_folder(config.output_dir) as temporary:
        content = rows.write(temporary, labels)
        write_entry(
            temporary,
            {
                "shards": addresses,
                "shard_sizes": rows.shard_sizes,
                "num_images": len(rows.shards),
                "class_names": class_names,
                "content": hashlib.sha256(f"{content} {class_names}".encode()).hexdigest(),
            },
        )
        temporary.rename(config.output_dir)
    return Indexed(len(rows.shards), len(addresses), class_names, tuple(rows.left_out))


def shard_addresses(shards: str) -> list[str]:
    """Addresses of shards by a folder of .tar files, or a pattern with `*` or `{000..146}`.

    Raises:
        InputError: there are none.
    """
    numbers = _NUMBERS.search(shards)
    if numbers:
        first, last = numbers[1], numbers[2]
        found = [
            shards.replace(numbers[0], f"{number:0{len(first)}}")
            for number in range(int(first), int(last) + 1)
        ]
    elif is_remote(shards):
        pattern = shards if "*" in shards or shards.endswith(".tar") else f"{shards}/*.tar"
        found = find_files(pattern) if "*" in pattern else [pattern]
    else:
        path = Path(shards).absolute()
        folder, pattern = (path, "*.tar") if path.is_dir() else (path.parent, path.name)
        found = sorted(map(str, folder.glob(pattern)))
    if not found:
        raise InputError(f"SHARDS: there are no .tar files in {printable(shards)}")
    return found if is_remote(shards) else [str(Path(own).absolute()) for own in found]


class _Rows:
    """The columns of the index: numbers side by side, no object for each image."""

    def __init__(self, config: IndexShardsConfig) -> None:
        self.config = config
        self.shard_sizes: list[int] = []
        self.names = NewNames()
        self.shards, self.labels = array("i"), array("q")
        self.offsets, self.sizes = array("q"), array("q")
        self.caption_offsets, self.caption_sizes = array("q"), array("q")
        self.classes: dict[str, int] = {}
        self.left_out: list[str] = []

    def add_shard(self, number: int, address: str) -> None:
        """Adds the samples of a shard; it stays out, from where it is damaged on."""
        self.shard_sizes.append(0)
        try:
            with _opened(address) as file:
                file.seek(0, io.SEEK_END)
                self.shard_sizes[-1] = file.tell()
                file.seek(0)
                for key, fields, label in _samples(file, address, self.config.label_field):
                    reason = self._add(number, key, fields, label)
                    if reason:
                        self._refuse(f"{key} in {address}", reason)
        except InputError:
            raise
        except (OSError, tarfile.TarError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            self._refuse(address, f"cannot be read to its end: {reason}")

    def _add(self, number: int, key: str, fields: dict[str, Place], label: str | None) -> str:
        """Adds a sample; or says why not."""
        config = self.config
        images = [name for name in fields if f".{name}" in FORMAT_OF_SUFFIX]
        if config.image_field:
            images = [config.image_field] if config.image_field in fields else []
        if len(images) != 1:
            several = f"several, {' and '.join(images)}: give --image-field" if images else "none"
            return f"must have one image, has {several}"
        if config.label_field and label is None:
            return f"has no field {config.label_field} of text"
        if config.caption_field and config.caption_field not in fields:
            return f"has no field {config.caption_field}"
        self.names.add(f"{key}.{images[0]}")
        self.shards.append(number)
        self.offsets.append(fields[images[0]].offset)
        self.sizes.append(fields[images[0]].size)
        self.labels.append(self.classes.setdefault(label, len(self.classes)) if label else 0)
        if config.caption_field:
            self.caption_offsets.append(fields[config.caption_field].offset)
            self.caption_sizes.append(fields[config.caption_field].size)
        return ""

    def _refuse(self, what: str, reason: str) -> None:
        if not self.config.skip_unreadable:
            raise InputError(f"{what} {reason}; give --skip-unreadable to leave out such samples")
        self.left_out.append(f"{what} {reason}")

    def write(self, folder: Path, labels: np.ndarray) -> str:
        """Writes all columns; gives a hash of what the images are, wherever they lie."""
        self.names.write(folder)
        columns: dict[str, np.ndarray] = {
            "shards": np.array(self.shards, np.int32),
            "offsets": np.array(self.offsets, np.int64),
            "sizes": np.array(self.sizes, np.int64),
        }
        if self.config.label_field:
            columns["labels"] = labels.astype(np.int32)
        if self.config.caption_field:
            columns["caption_offsets"] = np.array(self.caption_offsets, np.int64)
            columns["caption_sizes"] = np.array(self.caption_sizes, np.int64)
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", column)
        digest = hashlib.sha256((folder / "names.npy").read_bytes())
        digest.update(columns["sizes"].tobytes() + labels.tobytes())
        return digest.hexdigest()


def _opened(address: str) -> Any:
    if is_remote(address):
        return io.BufferedReader(RangeFile(address), _BUFFER_BYTES)
    return Path(address).open("rb")


def _samples(
    file: Any, address: str, label_field: str
) -> Iterator[tuple[str, dict[str, Place], str | None]]:
    """Key, fields and label of each sample of a shard.

    Raises:
        tarfile.TarError: the shard is damaged.
    """
    key, fields, label = "", dict[str, Place](), None
    for name, place in _members(file, address):
        folder, _, stem = name.rpartition("/")
        stem, _, field = stem.partition(".")
        own_key = f"{folder}/{stem}" if folder else stem
        if own_key != key and fields:
            yield key, fields, label
        if own_key != key:
            key, fields, label = own_key, {}, None
        fields[field.lower()] = place
        if field.lower() == label_field and place.size <= _MOST_LABEL_BYTES:
            file.seek(place.offset)
            label = file.read(place.size).decode("utf-8", "replace").strip() or None
    if fields:
        yield key, fields, label


def _members(file: Any, address: str) -> Iterator[tuple[str, Place]]:
    """Name and place of each file of a shard.

    Raises:
        tarfile.TarError: it is no plain tar, or damaged.
    """
    file.seek(0, io.SEEK_END)
    num_bytes = file.tell()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as shard:
        while (member := shard.next()) is not None:
            shard.members = []  # type: ignore[attr-defined]  # which would otherwise all be kept
            end = member.offset_data + member.size
            if end > num_bytes:
                raise tarfile.ReadError(f"{printable(member.name)} is cut short")
            if member.isreg() and not Path(member.name).name.startswith("."):
                yield member.name, Place(member.offset_data, member.size)
        file.seek(shard.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0") or shard.offset >= num_bytes:
            raise tarfile.ReadError(f"damaged or cut short at byte {shard.offset:,}")
