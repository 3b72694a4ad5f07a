"""Files that are written atomically."""

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from tokenizer.storage.errors import InputError


def make_folder(folder: Path) -> None:
    """Makes a folder to save in, and those above it.

    Raises:
        InputError: there is a file in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise InputError(
            f"folder must be a new one or a folder, got {folder}: {file} is a file"
        ) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, then moves it to `path` atomically.

    Whatever was at `path` stays whole if writing fails: no space left, say.
    """
    temporary = path.with_name(f".{path.name}.tmp{uuid.uuid4().hex[:12]}")
    try:
        temporary.touch()  # with the permissions that new files get here
        permissions = temporary.stat().st_mode
        with naming(path):
            write(temporary)
        temporary.chmod(permissions)  # safetensors makes its files private
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a file in errors of writing it, where the system does not: if the disk is full, say."""
    try:
        yield
    except SafetensorError as error:  # of the system, in words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
