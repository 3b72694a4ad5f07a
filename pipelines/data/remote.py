"""Bytes of files elsewhere, by fsspec: each request has a time-out and is tried three times."""

import io
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

T = TypeVar("T")

NUM_TRIES = 3
TIMEOUT_S = 30.0
"""Of each try: a request is for some megabytes at most."""
BYTES_PER_REQUEST = 2**23


def is_remote(address: str) -> bool:
    """Whether it is no path of this machine."""
    return "://" in address


def file_size(address: str) -> int:
    """Size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file system does not answer, or cannot be had.
    """
    size = _insist(address, lambda system, path: system.size(path))
    if size is None:
        raise InputError(f"{address} does not tell its size, without which it cannot be read")
    return int(size)


def find_files(pattern: str) -> list[str]:
    """Addresses that match a pattern with `*`, sorted.

    Raises:
        InputError: the file system does not answer, or cannot be had.
    """
    return _insist(
        pattern, lambda system, path: sorted(map(system.unstrip_protocol, system.glob(path)))
    )


def read_range(address: str, start: int, size: int) -> bytes:
    """Some bytes of a file; fewer where it ends before.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file system does not answer, or not with what was asked for.
    """
    content: bytes = _insist(
        address, lambda system, path: system.cat_file(path, start=start, end=start + size)
    )
    if len(content) > size:
        raise InputError(f"{address} must be where parts of a file can be had (range requests)")
    return content


class RangeFile(io.RawIOBase):
    """A file elsewhere, to be read from any place; for `io.BufferedReader`."""

    def __init__(self, address: str) -> None:
        self.address, self.size, self.position = address, file_size(address), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """The place."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Reads as much as fits."""
        size = min(len(buffer), self.size - self.position)
        content = read_range(self.address, self.position, size) if size > 0 else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _insist(address: str, request: Callable[[Any, str], T]) -> T:
    """What a file system answers, at the first, second or third try."""
    error: BaseException = TimeoutError()
    for _ in range(NUM_TRIES):
        try:
            return _within_time(lambda: request(*_system(address)))
        except (FileNotFoundError, InputError):
            raise
        except Exception as raised:  # each file system has errors of its own
            error = raised
    reason = shortened(" ".join(str(error).split()))
    reason = f": {reason}" if reason else ""
    raise InputError(
        f"{address} does not answer: {NUM_TRIES} tries of at most {TIMEOUT_S:g} s, the last ended "
        f"with {type(error).__name__}{reason}"
    ) from error


def _system(address: str) -> tuple[Any, str]:
    """The file system and the path in it; anew in each process, as connections outlast no fork."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{address} cannot be read: {shortened(' '.join(str(error).split()))}"
        ) from error
    return system, path


def _within_time(request: Callable[[], T]) -> T:
    """The answer to a request, which is left alone where it takes longer."""
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((True, request()))
        except BaseException as error:
            answers.put((False, error))

    # Not of a pool, whose threads Python would wait for at its end.
    threading.Thread(target=ask, daemon=True).start()
    try:
        is_answer, answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError from None
    if not is_answer:
        raise answer
    result: T = answer
    return result
