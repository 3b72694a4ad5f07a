"""Permutations that are computed place by place: no list of all items, however many there are.

A Feistel network permutes the numbers of an even count of bits; a number that lies beyond the
items is permuted again until it does not ("cycle walking", Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002). What is left is a permutation of the items.
"""

import numpy as np
from jaxtyping import Int64, UInt64

NUM_ROUNDS = 6
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(
    places: Int64[np.ndarray, " places"], num_items: int, keys: UInt64[np.ndarray, " rounds"]
) -> Int64[np.ndarray, " places"]:
    """The items at some places of the permutation of [0, `num_items`) that `keys` choose."""
    half = np.uint64(max(1, -(-(num_items - 1).bit_length() // 2)))
    values = places.astype(np.uint64)
    outside = np.ones(len(values), np.bool_)
    while outside.any():
        values[outside] = _exchange(values[outside], half, keys)
        outside = values >= num_items
    return values.astype(np.int64)


def _exchange(
    values: UInt64[np.ndarray, " values"], half: np.uint64, keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " values"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(values: UInt64[np.ndarray, " values"]) -> UInt64[np.ndarray, " values"]:
    """Bits that depend on all bits: the output function of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
