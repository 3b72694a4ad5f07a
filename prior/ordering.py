"""All codes of an image, partitioned into the steps of an autoregressive model."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prior.config import Order
from tokenizer.code_maps import check_indices
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError

MAX_SLOTS = 1024
MAX_CODES = 2**16
"""Bounds of what may be built: 128 by 128 positions with four layers reach it."""


class SlotType(NamedTuple):
    """What a slot holds, whichever the step."""

    group: int
    """Resolution group of the code."""
    offset: int
    """Raster index of the code's position within its cell; 0 in the coarse_to_fine order."""
    layer: int
    """Layer of the code within its group."""


class _Code(NamedTuple):
    type: SlotType
    row: int
    column: int


class CodeOrdering(nn.Module):
    """Partitions the codes of an image into `num_steps` steps of up to `num_slots` slots.

    coarse_to_fine: a step is one position of one map, group by group, in raster order within a
    map; its slots are the layers of that position (RQ-Transformer, arXiv 2203.01941).
    cell: a step is one position of the coarsest map; its slots are all codes under it, group by
    group, in raster order within the cell, layer by layer.

    In both orders every code has exactly one slot, and (step, slot) is a total order. A model
    that predicts each code from all earlier ones thus has an exact joint likelihood: the sum of
    its conditional log probabilities.

    A module only so that its index tensors follow the device of the model; it has no parameters
    and saves nothing.

    Raises:
        InputError: the maps do not go from coarse to fine, or the cell order is given a map that
            is no integer multiple of the coarsest one, or there are too many codes.
    """

    steps: list[list[SlotType]]
    """What the slots of each step hold, without padding."""
    slot_types: list[SlotType]
    """All types, in the order of their first appearance."""
    mask: Tensor
    """(num_steps, num_slots): whether a slot holds a code; the others, always last, are padding."""
    group: Tensor
    """(num_steps, num_slots): group of each code, -1 in padding; likewise the next three."""
    layer: Tensor
    row: Tensor
    column: Tensor
    slot_type: Tensor
    """(num_steps, num_slots): index into `slot_types`, 0 in padding."""
    parent_step: Tensor
    """(num_steps,): step of the enclosing position in the next coarser map, -1 if there is none."""
    _slot_of_code: Tensor
    _code_of_slot: Tensor

    def __init__(self, code_maps: Sequence[CodeMapConfig], order: Order) -> None:
        super().__init__()
        _check_maps(code_maps, order)
        self.code_maps = tuple(code_maps)
        steps = list(_cells(code_maps) if order == "cell" else _positions(code_maps))
        self.num_steps = len(steps)
        self.steps = [[code.type for code in step] for step in steps]
        self.num_slots = max(len(step) for step in steps)
        self.slot_types = list(dict.fromkeys(slot for step in self.steps for slot in step))

        # Codes are numbered group by group, layer by layer, in raster order.
        first_number: dict[tuple[int, int], int] = {}
        total = 0
        for group, code_map in enumerate(code_maps):
            for layer in range(code_map.depth):
                first_number[group, layer] = total
                total += code_map.height * code_map.width
        type_index = {slot_type: number for number, slot_type in enumerate(self.slot_types)}
        rows = []
        for step, codes in enumerate(steps):
            for slot, ((group, offset, layer), row, column) in enumerate(codes):
                kind = type_index[SlotType(group, offset, layer)]
                number = first_number[group, layer] + row * code_maps[group].width + column
                rows.append((step, slot, group, layer, row, column, kind, number))
        table = torch.tensor(rows).T
        columns = torch.full((6, self.num_steps, self.num_slots), -1)
        columns[:, table[0], table[1]] = table[2:]
        mask = columns[0] >= 0
        numbers = columns[5].masked_fill(~mask, total).flatten()
        for name, tensor in (
            ("mask", mask),
            ("group", columns[0]),
            ("layer", columns[1]),
            ("row", columns[2]),
            ("column", columns[3]),
            ("slot_type", columns[4].clamp_min(0)),
            ("parent_step", self._parents(steps)),
            ("_code_of_slot", numbers),
            ("_slot_of_code", numbers.argsort(stable=True)[:total]),
        ):
            self.register_buffer(name, tensor.clone(), persistent=False)

    def _parents(self, steps: list[list[_Code]]) -> Tensor:
        step_at = {
            (codes[0].type.group, codes[0].row, codes[0].column): step
            for step, codes in enumerate(steps)
        }
        parents = []
        for codes in steps:
            group, row, column = codes[0].type.group, codes[0].row, codes[0].column
            if group == 0:
                parents.append(-1)
                continue
            fine, coarse = self.code_maps[group], self.code_maps[group - 1]
            parent_row = row * coarse.height // fine.height
            parent_column = column * coarse.width // fine.width
            parents.append(step_at[group - 1, parent_row, parent_column])
        return torch.tensor(parents)

    def slots(self, group: int, layer: int) -> Int[Tensor, "height width"]:
        """Indices into the flattened (num_steps * num_slots) of one layer's codes."""
        first = sum(m.depth * m.height * m.width for m in self.code_maps[:group])
        code_map = self.code_maps[group]
        size = code_map.height * code_map.width
        numbers = self._slot_of_code[first + layer * size : first + (layer + 1) * size]
        return numbers.view(code_map.height, code_map.width)

    def flatten(
        self, indices: Sequence[Int[Tensor, "batch _depth _height _width"]]
    ) -> Int[Tensor, "batch steps slots"]:
        """Code indices in the order of the steps, 0 in padding slots."""
        codes = torch.cat([group.flatten(1) for group in indices], dim=1)
        padded = nn.functional.pad(codes, (0, 1))
        return padded[:, self._code_of_slot].view(-1, self.num_steps, self.num_slots)

    def unflatten(
        self, codes: Int[Tensor, "batch steps slots"]
    ) -> list[Int[Tensor, "batch _depth _height _width"]]:
        """The inverse of `flatten`; padding slots are ignored."""
        numbered = codes.flatten(1)[:, self._slot_of_code]
        sizes = [m.depth * m.height * m.width for m in self.code_maps]
        return [
            part.view(-1, m.depth, m.height, m.width)
            for part, m in zip(torch.split(numbered, sizes, dim=1), self.code_maps, strict=True)
        ]

    def check(self, indices: Any, name: str = "indices", allows_unknown: bool = False) -> None:
        """Waits for the device and checks shapes, types and values; -1 is a code to be drawn.

        Raises:
            InputError: `indices`, called `name` in the message, do not fit the code maps.
        """
        check_indices(indices, self.code_maps, name, -1 if allows_unknown else 0)


def _check_maps(code_maps: Sequence[CodeMapConfig], order: Order) -> None:
    if not code_maps:
        raise InputError("code_maps must hold at least one map, got none")
    coarsest = previous = code_maps[0]
    for group, code_map in enumerate(code_maps):
        size = f"{code_map.height} x {code_map.width}"
        if code_map.height < previous.height or code_map.width < previous.width:
            raise InputError(
                "code_maps must go from coarse to fine, "
                f"got {size} after {previous.height} x {previous.width}"
            )
        if order == "cell" and (
            code_map.height % coarsest.height or code_map.width % coarsest.width
        ):
            raise InputError(
                f"code_maps[{group}] must be an integer multiple of the coarsest map "
                f"{coarsest.height} x {coarsest.width} in the cell order, got {size}"
            )
        previous = code_map
    sizes = [code_map.height * code_map.width for code_map in code_maps]
    if order == "cell":
        num_steps = sizes[0]
        num_slots = sum(
            m.depth * size // sizes[0] for m, size in zip(code_maps, sizes, strict=True)
        )
    else:
        num_steps = sum(sizes)
        num_slots = max(code_map.depth for code_map in code_maps)
    if num_slots > MAX_SLOTS or num_steps * num_slots > MAX_CODES:
        raise InputError(
            f"code_maps must give at most {MAX_SLOTS} codes in a step and {MAX_CODES} in all in "
            f"the {order} order, got {num_slots} and {num_steps * num_slots}"
        )


def _positions(code_maps: Sequence[CodeMapConfig]) -> Iterator[list[_Code]]:
    for group, code_map in enumerate(code_maps):
        for row in range(code_map.height):
            for column in range(code_map.width):
                yield [
                    _Code(SlotType(group, 0, layer), row, column) for layer in range(code_map.depth)
                ]


def _cells(code_maps: Sequence[CodeMapConfig]) -> Iterator[list[_Code]]:
    rows, columns = code_maps[0].height, code_maps[0].width
    for cell in range(rows * columns):
        cell_row, cell_column = divmod(cell, columns)
        codes = []
        for group, code_map in enumerate(code_maps):
            height, width = code_map.height // rows, code_map.width // columns
            for offset in range(height * width):
                row = cell_row * height + offset // width
                column = cell_column * width + offset % width
                codes += [
                    _Code(SlotType(group, offset, layer), row, column)
                    for layer in range(code_map.depth)
                ]
        yield codes
