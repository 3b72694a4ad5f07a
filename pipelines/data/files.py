"""A folder of images of any number, decoded each time; its files are listed once."""

import hashlib
import json
import logging
import os
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from pipelines.config import DataConfig
from pipelines.data.cache import (
    delete_and_start_again,
    open_array,
    open_entry,
    temporary_folder,
    write_entry,
)
from pipelines.data.dataset import Split
from pipelines.data.decoding import VERSION, read_file
from pipelines.data.encoded_images import EncodedImages, describe_decoding
from pipelines.data.folder import split_listing
from pipelines.data.name_table import NameTable, NewNames
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import naming

logger = logging.getLogger(__name__)


class FolderStore:
    """Files below a folder, by the rows of a table of their names."""

    def __init__(self, root: Path, names: NameTable) -> None:
        self.root, self.names = root, names

    def read(self, row: int) -> bytes:
        """The file."""
        return read_file(Path(self.name(row)))

    def name(self, row: int) -> str:
        """Its path."""
        return os.path.join(self.root, self.names[row])


class FileImages(EncodedImages):
    """Images that are files of a folder."""

    def item_names(self) -> list[str]:
        """Paths of the images below their folder, by which what belongs to them is found."""
        assert isinstance(self.store, FolderStore)
        return [self.store.names[row] for row in range(len(self))]


def open_files(config: DataConfig, split: Split) -> EncodedImages:
    """One split of the folder `config.root`, the same files as `folder` finds.

    Their names, classes and sizes are listed once in `config.cache_dir`, and again where a folder
    has changed since. Content that changes in place, with its size or without, goes unnoticed.

    Raises:
        InputError: a folder that does not fit.
    """
    roots = [config.root, config.validation_root]
    identity = [
        split,
        [str(root.resolve()) if root else None for root in roots],
        *(config.validation_share, config.seed, config.folder_rules),
        *(config.follow_links, config.skip_unreadable),
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    folder = config.cache_dir / f"files-{split}-{key}"
    with delete_and_start_again(folder):
        if not (folder.exists() and _is_current(found := open_entry(folder))):
            _list(folder, config, split)
            found = open_entry(folder)
        names = NameTable(folder, found["num_images"])
        labels = open_array(folder / "labels.npy", np.int64, (len(names),))
    root = Path(found["root"])
    conversion = describe_decoding(config)
    return FileImages(
        store=FolderStore(root, names),
        rows=None,
        labels=labels,
        class_names=tuple(found["class_names"]),
        fingerprint=hashlib.sha256(
            json.dumps([found["content"], VERSION, conversion]).encode()
        ).hexdigest(),
        description=f"{root}, {found['how']}; {conversion}",
        config=config,
    )


def _is_current(found: dict[str, Any]) -> bool:
    return all(_modified(Path(name)) == time for name, time in found["folders"].items())


def _modified(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _list(folder: Path, config: DataConfig, split: Split) -> None:
    """Lists the files; a changed folder takes the place of what was listed before."""
    # Before the files are looked for: what changes meanwhile shows next time.
    roots = [root for root in (config.root, config.validation_root) if root is not None]
    folders = {
        path: _modified(Path(path)) for root in roots for path, _, _ in os.walk(root.resolve())
    }
    listing, how = split_listing(config, split)
    sizes = np.array([_size(listing.root / name) for name in listing.names], np.int64)
    content = hashlib.sha256(json.dumps(listing.class_names).encode())
    for name, label in zip(listing.names, listing.labels, strict=True):
        content.update(f"{name}\0{label}\0".encode())
    content.update(sizes.astype("<i8").tobytes())
    with temporary_folder(folder) as temporary:
        with naming(folder):
            names = NewNames()
            for name in listing.names:
                names.add(name)
            names.write(temporary)
            np.save(temporary / "labels.npy", np.array(listing.labels, np.int64))
            metadata = {
                "root": str(listing.root),
                "how": how,
                "num_images": len(listing.names),
                "class_names": listing.class_names,
                "content": content.hexdigest(),
                "folders": folders,
            }
            write_entry(temporary, metadata)
        if folder.exists():
            logger.info("%s has changed: its files are listed anew", listing.root)
            rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError as error:  # another run was faster
            if not folder.exists():
                raise InputError(f"data.cache_dir: {folder} cannot be written: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing is named when it is read
        return -1
