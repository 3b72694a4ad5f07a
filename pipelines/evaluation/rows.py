"""Matrices with a row per image, in memory or in shares on disk, read a block at a time."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
from safetensors import safe_open
from torch import Tensor

BLOCK_ROWS = 2000
"""Rows read at a time: of 2,048 features they take 33 MB in float64, their distances 32 MB."""


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """A matrix (images, dim) whose rows lie in safetensors files, none of which stays open.

    Rows are read as those of a tensor: `rows[start:stop]`, `rows[items]`.
    """

    paths: tuple[Path, ...]
    """Of the shares in their order."""
    name: str
    """Of the tensor in each file."""
    share_size: int
    """Rows of every share but the last, which may have fewer."""
    shape: tuple[int, int]
    """Of the whole matrix."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int64[np.ndarray, " rows"]) -> Tensor:
        items = np.arange(len(self))[rows]
        found = torch.empty(len(items), self.shape[1])
        shares = items // self.share_size
        for share in np.unique(shares):
            here = np.flatnonzero(shares == share)
            with safe_open(self.paths[share], "pt") as file:
                # A view of the mapped file: no other rows are read.
                stored = file.get_tensor(self.name)
                found[here] = stored[items[here] - share * self.share_size]
        return found


Rows = Tensor | StoredRows
"""A matrix with a row per image, which need not be in memory."""


def block(rows: Rows, items: slice | np.ndarray) -> Float64[Tensor, "block dim"]:
    """Some rows, on the CPU in float64."""
    return rows[items].cpu().double()


def blocks(rows: Rows, count: int | None = None) -> Iterator[Float64[Tensor, "block dim"]]:
    """All rows, or the first `count`, in their order."""
    stop = len(rows) if count is None else count
    for start in range(0, stop, BLOCK_ROWS):
        yield block(rows, slice(start, min(start + BLOCK_ROWS, stop)))
