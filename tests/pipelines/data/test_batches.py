"""Laws of the data order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.batches import BatchOrder
from tokenizer.storage.errors import InputError

sizes = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(num_items=sizes, batch_size=sizes, seed=st.integers(0, 2**64))
def test_steps_cut_up_one_permutation_after_the_other(
    num_items: int, batch_size: int, seed: int
) -> None:
    order = BatchOrder(num_items, batch_size, seed)
    endless = np.concatenate([order.at(step)[0] for step in range(3 * num_items)])
    for epoch in endless[: len(endless) // num_items * num_items].reshape(-1, num_items):
        assert sorted(epoch.tolist()) == list(range(num_items))


@settings(max_examples=60, deadline=None)
@given(
    num_items=sizes,
    rows=st.integers(1, 4),
    steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    world=st.sampled_from([1, 2, 3, 4]),
)
def test_any_number_of_processes_sees_the_same_batches_whatever_each_has_seen_before(
    num_items: int, rows: int, steps: list[int], seed: int, world: int
) -> None:
    batch_size = 12 * rows
    whole = BatchOrder(num_items, batch_size, seed, flip=True)
    for step in steps:
        items, mirrored = whole.at(step)
        for rank in range(world):
            part = BatchOrder(num_items, batch_size, seed, rank, world, flip=True)
            part_items, part_mirrored = part.at(step)
            assert part_items.shape == part_mirrored.shape == (batch_size // world,)
            np.testing.assert_array_equal(part_items, items[rank::world])
            np.testing.assert_array_equal(part_mirrored, mirrored[rank::world])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [BatchOrder(50, 50, seed).at(epoch)[0] for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_flips_do_not_change_the_order_and_are_off_by_default() -> None:
    plain, flipped = BatchOrder(50, 8, 0), BatchOrder(50, 8, 0, flip=True)
    for step in range(20):
        np.testing.assert_array_equal(plain.at(step)[0], flipped.at(step)[0])
        assert not plain.at(step)[1].any()


def test_half_of_the_images_are_mirrored_independently_of_the_item() -> None:
    order = BatchOrder(100, 100, 0, flip=True)
    mirrored = np.zeros(100)
    for step in range(400):
        items, flips = order.at(step)
        mirrored[items] += flips
    assert abs(mirrored.mean() / 400 - 0.5) < 0.01  # 4 standard deviations
    assert abs(mirrored / 400 - 0.5).max() < 0.125  # 5 standard deviations


def test_the_first_batch_is_what_it_was() -> None:
    """The generator's raw output is promised to stay; a change breaks resuming."""
    items, mirrored = BatchOrder(10, 10, 0, flip=True).at(0)
    assert items.tolist() == GOLDEN_ITEMS
    assert mirrored.tolist() == GOLDEN_FLIPS


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^batch_size must be divisible by the number of processes 3, got 64$"
    ):
        BatchOrder(100, 64, seed=0, rank=0, world=3)


GOLDEN_ITEMS = [7, 6, 8, 3, 2, 4, 1, 5, 0, 9]
GOLDEN_FLIPS = [True, True, True, False, False, True, False, True, True, True]
