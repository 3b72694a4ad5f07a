"""Which rows of a numbered set are for training, and which for validation."""

import numpy as np
from jaxtyping import Int64

from pipelines.config import DataConfig
from pipelines.data.dataset import Split
from tokenizer.storage.errors import InputError

_ROWS_AT_A_TIME = 2**20


def split_rows(num_rows: int, config: DataConfig, split: Split) -> Int64[np.ndarray, " rows"]:
    """The rows of one split, in their order: each is held out by a number of its own.

    Raises:
        InputError: nothing is left for one of the splits.
    """
    # Raw output, which numpy keeps the same in all versions.
    bits = np.random.Philox(np.random.SeedSequence(config.seed, spawn_key=(4,)))
    bound = np.uint64(config.validation_share * 2**64)
    parts = []
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
        own = bits.random_raw(min(_ROWS_AT_A_TIME, num_rows - start))
        parts.append(start + np.flatnonzero((own < bound) == (split == "validation")))
    rows = np.concatenate(parts)
    if not 0 < len(rows) < num_rows:
        raise InputError(
            "data.validation_share must leave images for training and for validation, got "
            f"{config.validation_share:g} of {num_rows} images"
        )
    return rows
