"""Millions of names without an object for each: their bytes, one after the other, on the disk."""

from array import array
from pathlib import Path

import numpy as np

from pipelines.data.cache import open_array

_BYTES, _ENDS = "names.npy", "name_ends.npy"


class NameTable:
    """Names in a folder, read through memory maps.

    Raises:
        InputError: they are damaged.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._ends = open_array(folder / _ENDS, np.int64, (count,))
        self._bytes = open_array(folder / _BYTES, np.uint8, (int(self._ends[-1]),))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        start = self._ends[row - 1] if row else 0
        return self._bytes[start : self._ends[row]].tobytes().decode()


class NewNames:
    """Names to be written; of all of them, only their bytes are held in memory."""

    def __init__(self) -> None:
        self._bytes, self._ends = bytearray(), array("q")

    def add(self, name: str) -> None:
        """Adds one at the end."""
        self._bytes += name.encode()
        self._ends.append(len(self._bytes))

    def write(self, folder: Path) -> None:
        """Writes what `NameTable` reads."""
        np.save(folder / _BYTES, np.frombuffer(self._bytes, np.uint8))
        np.save(folder / _ENDS, np.array(self._ends, np.int64))
