"""Shards from elsewhere on the local disk, whole, as many as a bound permits.

Images of the others are read one by one, by ranges. No shard is given up for another: where an
epoch needs all of them in random order, that would only move bytes to and fro.
"""

import errno
import fcntl
import hashlib
from pathlib import Path

from pipelines.data.remote import BYTES_PER_REQUEST, read_range
from tokenizer.storage.errors import InputError

_LOCK = ".lock"


class ShardCache:
    """Files of shards in a folder, shared by processes and runs."""

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def path_of(self, address: str, size: int) -> Path | None:
        """A local copy of a shard of this size, fetched now if there is room; None if not.

        While another process fetches a shard there is none, either.

        Raises:
            FileNotFoundError: there is no such shard.
            InputError: the disk is full, or what holds the shard does not answer.
        """
        key = hashlib.sha256(f"{address} {size}".encode()).hexdigest()[:20]
        path = self.folder / f"{key}.tar"
        if path.exists():
            return path
        with (self.folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            held = sum(other.stat().st_size for other in self.folder.glob("*.tar"))
            if held + size > self.most_bytes:
                return None
            self._fetch(address, size, path)
        return path

    def _fetch(self, address: str, size: int, path: Path) -> None:
        temporary = path.with_suffix(".part")
        try:
            with temporary.open("wb") as file:
                for start in range(0, size, BYTES_PER_REQUEST):
                    file.write(read_range(address, start, min(BYTES_PER_REQUEST, size - start)))
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"data.cache_dir: no room in {self.folder} for the shard {address} of {size:,} "
                "bytes; make some, or lower data.reading.shard_cache_gb"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
