"""Orders of codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior.config import Order
from prior.ordering import CodeOrdering
from tests.prior.small_priors import ORDERS, random_codes
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError


def code_map(height: int, width: int, *sizes: int) -> CodeMapConfig:
    return CodeMapConfig(height=height, width=width, codebook_sizes=sizes, code_dim=3)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[CodeMapConfig, ...]:
    """Maps from coarse to fine, each a multiple of the coarsest."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    scales = sorted(draw(st.lists(st.integers(1, 3), max_size=2)))
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    return tuple(code_map(height * s, width * s, *draw(sizes)) for s in [1, *scales])


@settings(deadline=None, max_examples=40)
@given(layouts(), st.sampled_from(ORDERS), st.integers(0, 99))
def test_unflatten_is_the_exact_inverse_of_flatten(
    code_maps: tuple[CodeMapConfig, ...], order: Order, seed: int
) -> None:
    ordering = CodeOrdering(code_maps, order)
    indices = random_codes(code_maps, 2, seed)
    codes = ordering.flatten(indices)
    assert (codes[:, ~ordering.mask] == 0).all()
    for group, restored in zip(indices, ordering.unflatten(codes), strict=True):
        torch.testing.assert_close(restored, group, rtol=0, atol=0)
    torch.testing.assert_close(ordering.flatten(ordering.unflatten(codes)), codes)


@settings(deadline=None, max_examples=40)
@given(layouts(), st.sampled_from(ORDERS))
def test_every_code_has_exactly_one_slot_with_its_coordinates(
    code_maps: tuple[CodeMapConfig, ...], order: Order
) -> None:
    ordering = CodeOrdering(code_maps, order)
    indices = random_codes(code_maps, 1)
    codes = ordering.flatten(indices)[0]
    seen = set()
    for step in range(ordering.num_steps):
        for slot in range(ordering.num_slots):
            if ordering.mask[step, slot]:
                tables = (ordering.group, ordering.layer, ordering.row, ordering.column)
                group, layer, row, column = (int(table[step, slot]) for table in tables)
                assert codes[step, slot] == indices[group][0, layer, row, column]
                assert ordering.steps[step][slot][::2] == (group, layer)
                assert ordering.slot_types[ordering.slot_type[step, slot]][::2] == (group, layer)
                flat = step * ordering.num_slots + slot
                assert ordering.slots(group, layer)[row, column] == flat
                seen.add((group, layer, row, column))
            else:
                assert slot >= len(ordering.steps[step])
    assert len(seen) == sum(m.depth * m.height * m.width for m in code_maps)
    assert int(ordering.mask.sum()) == len(seen)


@settings(deadline=None, max_examples=40)
@given(layouts(), st.sampled_from(ORDERS))
def test_the_parent_is_the_enclosing_position_in_an_earlier_step(
    code_maps: tuple[CodeMapConfig, ...], order: Order
) -> None:
    ordering = CodeOrdering(code_maps, order)
    for step, parent in enumerate(ordering.parent_step.tolist()):
        group = int(ordering.group[step, 0])
        assert (parent == -1) == (group == 0)
        if parent >= 0:
            scale = code_maps[group].height // code_maps[group - 1].height
            if scale * code_maps[group - 1].height != code_maps[group].height:
                continue
            assert parent < step
            assert int(ordering.group[parent, 0]) == group - 1
            assert int(ordering.row[parent, 0]) == int(ordering.row[step, 0]) // scale
            assert int(ordering.column[parent, 0]) == int(ordering.column[step, 0]) // scale


def test_orders_of_a_small_pyramid() -> None:
    code_maps = (code_map(1, 2, 5, 5), code_map(2, 4, 5))
    coarse = torch.tensor([[[[0, 1]], [[10, 11]]]])
    fine = torch.arange(20, 28).view(1, 1, 2, 4)
    cell = CodeOrdering(code_maps, "cell").flatten([coarse, fine])
    assert cell.tolist() == [[[0, 10, 20, 21, 24, 25], [1, 11, 22, 23, 26, 27]]]
    ordering = CodeOrdering(code_maps, "coarse_to_fine")
    expected = [[0, 10], [1, 11], *([code, 0] for code in range(20, 28))]
    assert ordering.flatten([coarse, fine]).tolist() == [expected]


@pytest.mark.parametrize(
    ("code_maps", "order", "message"),
    [
        ((), "cell", "at least one map"),
        ((code_map(4, 4, 2), code_map(6, 6, 2)), "cell", r"code_maps\[1\] .* multiple"),
        ((code_map(4, 4, 2), code_map(2, 2, 2)), "coarse_to_fine", "coarse to fine"),
    ],
)
def test_maps_that_do_not_suit_the_order_are_rejected(
    code_maps: tuple[CodeMapConfig, ...], order: Order, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CodeOrdering(code_maps, order)


def test_maps_that_are_no_multiples_have_a_coarse_to_fine_order() -> None:
    ordering = CodeOrdering((code_map(2, 2, 3), code_map(3, 3, 3)), "coarse_to_fine")
    assert ordering.parent_step.tolist() == [-1] * 4 + [0, 0, 1, 0, 0, 1, 2, 2, 3]


def test_wrong_indices_are_rejected() -> None:
    ordering = CodeOrdering((code_map(2, 2, 3, 5), code_map(4, 4, 7)), "cell")
    coarse, fine = torch.zeros(1, 2, 2, 2).long(), torch.zeros(1, 1, 4, 4).long()
    for indices, message in (
        ([coarse], "must hold 2 maps, got 1"),
        ([coarse[:, :1], fine], r"indices\[0\] must have shape \(1, 2, 2, 2\)"),
        ([coarse, fine.repeat(2, 1, 1, 1)], r"indices\[1\] must have shape \(1, 1, 4, 4\)"),
        ([coarse.int(), fine], r"indices\[0\] must be int64"),
        ([coarse, fine + 7], r"indices\[1\]\[:, 0\] must lie in \[0, 7\), got 7"),
        ([coarse - 1, fine], r"indices\[0\]\[:, 0\] must lie in \[0, 3\), got -1"),
    ):
        with pytest.raises(InputError, match=message):
            ordering.check(indices)
    ordering.check([coarse - 1, fine], allows_unknown=True)
    with pytest.raises(InputError, match=r"indices\[0\]\[:, 0\] must lie in \[-1, 3\), got -2"):
        ordering.check([coarse - 2, fine], allows_unknown=True)
