"""Entries of a cache: folders of arrays with a manifest, `facts.json`, written once.

Opening an entry compares the size and the modification time of each file with the manifest. Only
where a time differs, after a copy say, are the files compared with their hashes, and the new times
recorded. `check_data --verify` always compares the hashes.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pipelines.run.manifest import (
    check_files,
    modification_times,
    read_manifest,
    replace_manifest,
    write_manifest,
)
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_MANIFEST = "facts.json"
_TIMES = "mtime_ns"


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be filled and renamed to it; removed if it is not.

    Raises:
        InputError: it cannot be made.
    """
    temporary = folder.with_name(f".{folder.name}.tmp{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"data.cache_dir: {folder.parent} cannot be written: {error}") from error
    try:
        yield temporary
    finally:
        rmtree(temporary, ignore_errors=True)


def write_entry(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Adds the manifest to the files in `folder`, with `metadata` in it."""
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_manifest(folder / _MANIFEST, {**metadata, _TIMES: times})


def open_entry(folder: Path) -> dict[str, Any]:
    """The manifest of an entry whose files are as they were written, by size and time.

    Entries of version 0.1 hold no times; they are compared with their hashes once.

    Raises:
        InputError: one of its files is damaged.
    """
    path = folder / _MANIFEST
    manifest = read_manifest(path)
    times = modification_times(path, manifest)  # before reading: a later change shows next time
    if manifest.get(_TIMES) == times:
        return manifest
    logger.info("%s has other times than recorded: comparing it with its hashes", folder)
    check_files(path, manifest)
    manifest[_TIMES] = times
    try:
        replace_manifest(path, manifest)
    except OSError as error:
        logger.warning(
            "%s: cannot record that it is whole, so each start reads all of it: %s", folder, error
        )
    return manifest


def open_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only memory map of an array of an entry.

    Raises:
        InputError: it holds another one, or its header is damaged.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header, which fails in many ways
        raise InputError(f"{path} is damaged: {error}") from error
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{path} is damaged: it holds {array.dtype} {array.shape}")
    return array


@contextlib.contextmanager
def delete_and_start_again(folder: Path) -> Iterator[None]:
    """Adds to an error in opening an entry what to do about it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete {folder} and start again") from error


def verify_cache(cache_dir: Path) -> Iterator[tuple[Path, str]]:
    """Compares all files of all entries with their hashes; each entry with its damage, or "".

    Raises:
        InputError: there is no entry.
    """
    entries = sorted({path.parent for path in cache_dir.glob("[!.]*/*") if _is_of_entry(path)})
    if not entries:
        raise InputError(f"cache_dir: {cache_dir} holds no decoded images and no codes")
    for folder in entries:
        yield folder, _damage(folder)


def _is_of_entry(path: Path) -> bool:
    return path.name == _MANIFEST or path.suffix == ".npy"


def _damage(folder: Path) -> str:
    path = folder / _MANIFEST
    try:
        with delete_and_start_again(folder):
            check_files(path, read_manifest(path))
    except InputError as error:
        return str(error)
    return ""
