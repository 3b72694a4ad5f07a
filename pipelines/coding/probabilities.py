"""Probabilities by which codes are written and read: the same to the last bit on both ways.

Both ways walk through the same steps. A step has tables for some positions of a layer, as whole
numbers, and whoever walks fills in their codes before the next one; tables depend on nothing else.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from pipelines.marginals import Marginals
from tokenizer.code_prior import CodePrior
from tokenizer.config import CodeMapConfig
from tokenizer.storage.hashes import weights_hash
from tokenizer.topdown import TopDownPath

TABLE_SIZE = 2**20
"""Of a whole table, nearly: fine enough for 0.1 % of the bits at 1,024 codes, and coarse against
the rounding errors of another machine."""
BLOCK_SHARE, MAX_BLOCK = 8, 2**12
"""Counted codes go into tables in blocks, each this part of those before, and no larger; so do
those of stored counts, for the sake of memory."""


class Step(NamedTuple):
    """Codes of one layer that are coded together."""

    part: int
    """Of the file; never goes down from step to step."""
    layer: int
    codes: Int[Tensor, "height width"]
    """Of the layer, to be filled in."""
    positions: Bool[Tensor, "height width"]
    tables: Float64[np.ndarray, "positions codes"]
    """Whole numbers > 0."""


class Probabilities(ABC):
    """Where the probabilities of codes come from."""

    parts: Sequence[int]
    """Layers of each part of a file; a file that is cut behind a part has these layers."""
    identity: str = ""
    """Hash of what decides them beside the tokenizer's codes, if anything does."""
    code_maps: tuple[CodeMapConfig, ...] | None = None
    """The only ones that it knows; None: any."""

    @abstractmethod
    def __call__(self, indices: Sequence[Int[Tensor, "1 _ _ _"]]) -> Iterator[Step]:
        """All steps; `indices` are filled in meanwhile."""


class OwnPrior(Probabilities):
    """By the tokenizer's own prior.

    In double precision on the CPU, wherever the tokenizer is: machines differ in their last bits,
    and what is left of that after rounding to tables is rare.
    """

    def __init__(self, prior: CodePrior, top_down: TopDownPath) -> None:
        self.parts = [1] * sum(map(len, prior.heads))  # type: ignore[arg-type]
        self.identity = weights_hash(prior.state_dict())
        self._prior = copy.deepcopy(prior).cpu().double()
        self._top_down = copy.deepcopy(top_down).cpu().double()

    def __call__(self, indices: Sequence[Int[Tensor, "1 _ _ _"]]) -> Iterator[Step]:
        """All steps; `indices` are filled in meanwhile."""
        for now in self._prior.passes(self._top_down, indices, 0):
            tables = tables_of(now.log_probabilities[0])
            yield Step(now.layer, now.layer, now.codes[0], now.positions, tables)


class Counts(Probabilities):
    """By how often codes have come in the layer so far: whole numbers, the same everywhere."""

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self.parts = [1] * len(codebook_sizes)
        self._sizes = codebook_sizes

    def __call__(self, indices: Sequence[Int[Tensor, "1 _ _ _"]]) -> Iterator[Step]:
        """All steps; `indices` are filled in meanwhile."""
        layers = [layer for group in indices for layer in group[0]]
        for number, (codes, size) in enumerate(zip(layers, self._sizes, strict=True)):
            table = np.ones(size)
            places = torch.arange(codes.numel()).view(codes.shape)
            start = 0
            while start < codes.numel():
                end = start + min(1 + start // BLOCK_SHARE, MAX_BLOCK)
                positions = (places >= start) & (places < end)
                rows = np.repeat(table[None], int(positions.sum()), 0)
                yield Step(number, number, codes, positions, rows)
                table = table + 2 * np.bincount(codes[positions].numpy(), minlength=size)
                start = end


class StoredCounts(Probabilities):
    """By how often codes came in the training images: whole numbers, the same everywhere."""

    def __init__(self, marginals: Marginals) -> None:
        self.parts = [1] * len(marginals.counts)
        self.identity = marginals.content_hash()
        self._tables = [
            np.array([TABLE_SIZE * own // sum(counts) + 1 for own in counts], np.float64)
            for counts in marginals.counts
        ]

    def __call__(self, indices: Sequence[Int[Tensor, "1 _ _ _"]]) -> Iterator[Step]:
        """All steps; `indices` are filled in meanwhile."""
        layers = [layer for group in indices for layer in group[0]]
        for number, (codes, table) in enumerate(zip(layers, self._tables, strict=True)):
            places = torch.arange(codes.numel()).view(codes.shape)
            for start in range(0, codes.numel(), MAX_BLOCK):
                positions = (places >= start) & (places < start + MAX_BLOCK)
                rows = np.repeat(table[None], int(positions.sum()), 0)
                yield Step(number, number, codes, positions, rows)


def tables_of(
    log_probabilities: Float[Tensor, "positions codes"],
) -> Float64[np.ndarray, "positions codes"]:
    """Whole numbers in the proportions of the probabilities; none is 0."""
    shares = log_probabilities.double().exp() * TABLE_SIZE
    return np.asarray((shares.round() + 1).numpy())


@contextlib.contextmanager
def same_sums() -> Iterator[None]:
    """Sums in one order, whatever number of threads the program uses otherwise."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(number)
