"""Which rows of a numbered set are for training, and which for validation."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from pipelines.config import DataConfig
from pipelines.data.dataset import Split
from tokenizer.storage.errors import InputError

_ROWS_AT_A_TIME = 2**17


def split_rows(num_rows: int, config: DataConfig, split: Split) -> Int32[np.ndarray, " rows"]:
    """The rows of one split, in their order: each is held out by a number of its own.

    Raises:
        InputError: nothing is left for one of the splits.
    """
    assert num_rows < 2**31
    num_chosen = sum(len(part) for part in _parts(num_rows, config, split))
    if not 0 < num_chosen < num_rows:
        raise InputError(
            "data.validation_share must leave images for training and for validation, got "
            f"{config.validation_share:g} of {num_rows} images"
        )
    rows = np.empty(num_chosen, np.int32)
    end = 0
    for part in _parts(num_rows, config, split):  # once more: lists of parts would take as much
        rows[end : end + len(part)] = part
        end += len(part)
    return rows


def _parts(num_rows: int, config: DataConfig, split: Split) -> Iterator[np.ndarray]:
    # Raw output, which numpy keeps the same in all versions.
    bits = np.random.Philox(np.random.SeedSequence(config.seed, spawn_key=(4,)))
    bound = np.uint64(config.validation_share * 2**64)
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
        own = bits.random_raw(min(_ROWS_AT_A_TIME, num_rows - start))
        yield start + np.flatnonzero((own < bound) == (split == "validation"))
