"""The order of the data: which items, mirrored or not, make up the batch of a step."""

import copy

import numpy as np
from jaxtyping import Bool, Int64

from pipelines.data.permutation import NUM_ROUNDS, permuted
from tokenizer.storage.errors import InputError


def _random_bits(seed: int, purpose: int, number: int, count: int) -> np.ndarray:
    """Raw output of a generator, the only random numbers numpy keeps the same in all versions."""
    key = np.random.SeedSequence(seed, spawn_key=(purpose, number))
    return np.random.Philox(key).random_raw(count)


class BatchOrder:
    """Batches as a pure function of seed and step: resuming needs no state.

    The batches cut up an endless list, one fresh permutation of all items after the other.
    Process `rank` of `world` gets the rows `rank::world` of each batch, so that any number of
    processes sees the same batches. `scattered()` is another order, which holds no list of the
    items.

    Raises:
        InputError: `batch_size` cannot be shared out equally.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        flip: bool = False,
    ) -> None:
        if batch_size % world:
            raise InputError(
                f"batch_size must be divisible by the number of processes {world}, got {batch_size}"
            )
        assert num_items > 0
        assert batch_size > 0
        assert 0 <= rank < world
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.flip = flip
        self.is_scattered = False
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def scattered(self) -> "BatchOrder":
        """The same batches of permutations that are computed place by place, for many items."""
        order = copy.copy(self)
        order.is_scattered = True
        return order

    def at(self, step: int) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Items of this process's rows at `step` (from 0), and which of them to mirror."""
        assert step >= 0
        rows = slice(self.rank, None, self.world)
        positions = np.arange(self.batch_size, dtype=np.int64) + step * self.batch_size
        epochs, offsets = np.divmod(positions, self.num_items)
        items = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if self.is_scattered:
                keys = _random_bits(self.seed, 2, epoch, NUM_ROUNDS)
                items[here] = permuted(offsets[here], self.num_items, keys)
            else:
                items[here] = self._permutation_of(epoch)[offsets[here]]
        if self.flip:
            mirrored = _random_bits(self.seed, 1, step, self.batch_size) >= np.uint64(2**63)
        else:
            mirrored = np.zeros(self.batch_size, np.bool_)
        return items[rows], mirrored[rows]

    def _permutation_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            bits = _random_bits(self.seed, 0, epoch, self.num_items)
            self._permutation = np.argsort(bits, kind="stable").astype(np.int64)
            self._epoch = epoch
        return self._permutation
