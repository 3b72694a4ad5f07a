"""Laws of the permutations that hold no list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.batches import BatchOrder
from pipelines.data.permutation import permuted


@settings(max_examples=30)
@given(
    num_items=st.integers(1, 500),
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
)
def test_every_item_comes_once(num_items: int, keys: list[int]) -> None:
    items = permuted(np.arange(num_items), num_items, np.array(keys, np.uint64))
    assert sorted(items.tolist()) == list(range(num_items))


def test_of_ten_million_items_only_the_places_that_are_asked_for_are_computed() -> None:
    order = BatchOrder(10**7, 64, seed=3).scattered()
    batches = [order.at(step)[0] for step in (0, 1, 156_249, 156_250)]
    assert order._permutation.size == 0
    assert len(set(np.concatenate(batches[:3]).tolist())) == 192
    assert not np.array_equal(batches[0], batches[3])  # another epoch, another permutation


def test_places_and_items_are_independent() -> None:
    """Ranks that neighbors get are uncorrelated, and each tenth is spread over all tenths."""
    items = permuted(np.arange(100_000), 100_000, np.arange(6, dtype=np.uint64)).astype(float)
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.01
    counts = np.histogram2d(np.arange(100_000), items, 10)[0]
    assert abs(counts - 1_000).max() < 150  # five deviations


def test_scattered_epochs_hold_each_item_once_for_any_number_of_processes() -> None:
    whole = BatchOrder(23, 4, seed=1).scattered()
    endless = np.concatenate([whole.at(step)[0] for step in range(23)])
    for epoch in endless.reshape(4, 23):
        assert sorted(epoch.tolist()) == list(range(23))
    for rank in (0, 1):
        own = BatchOrder(23, 4, seed=1, rank=rank, world=2).scattered()
        np.testing.assert_array_equal(own.at(5)[0], whole.at(5)[0][rank::2])


def test_the_scattered_order_is_the_one_of_earlier_versions() -> None:
    order = BatchOrder(1_000, 6, seed=7).scattered()
    assert order.at(2)[0].tolist() == [43, 272, 88, 526, 851, 318]
