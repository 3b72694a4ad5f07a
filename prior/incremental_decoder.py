"""Generation code by code without computing anything twice."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.conditioner import VECTOR_AT_TIMES, Condition
from prior.ordering import SlotType
from prior.static_transformer import LEAST_ROWS, Linear, StaticTransformer
from prior.transformer import Prior
from tokenizer.storage.errors import InputError

MOST_AT_ONCE = 64
"""Inputs that are taken together, known codes or tokens; bounds the memory of their attention."""


class IncrementalDecoder:
    """A prior in the middle of images: gives the logits of the next code, takes the code.

    Its logits equal those of `Prior.logits` up to rounding. All memory is taken at once and all
    weights are read at once: they must not change meanwhile. The prior must be in evaluation mode.

    Args:
        prior: The prior.
        condition: What `prior.condition` or `prior.null_condition` gives.
        batch: Number of images.
    """

    @torch.inference_mode()
    def __init__(self, prior: Prior, condition: Condition, batch: int) -> None:
        ordering, device = prior.ordering, prior.start.device
        self.prior = prior
        self.batch = batch
        self._num_tokens = prior.conditioner.num_tokens
        rows = batch
        if device.type == "cpu":  # an image alone gets the bits that it has among others
            rows = max(rows, LEAST_ROWS)
        self._spatial_transformer = StaticTransformer(
            prior.spatial_transformer, rows, self._num_tokens + ordering.num_steps, prior.rotary
        )
        self._depth_transformer = StaticTransformer(
            prior.depth_transformer, rows, ordering.num_slots
        )
        parent = prior.parent_projection
        self._parent_projection = parent and Linear(parent.weight, None, rows)
        self._outputs = []
        for output in prior.outputs:
            assert isinstance(output, nn.Linear)
            weight = output.weight * self._depth_transformer.gain
            self._outputs.append(Linear(weight, output.bias, rows))
        self._table = prior.embedding.table()
        self._first_row = prior.embedding.first_row.tolist()
        self._slot_type = ordering.slot_type.tolist()
        self._first_predecessor = _first_predecessors(max(ordering.steps, key=len))
        depths = [code_map.depth for code_map in ordering.code_maps]
        self._first_layer = [sum(depths[:group]) for group in range(len(depths))]
        width = self._table.shape[1]
        self._contents = self._table.new_zeros(rows, ordering.num_steps + 1, width)
        self._contents[:, 0] = prior.start
        self._embeddings = self._table.new_zeros(rows, ordering.num_slots, width)
        self._vector = None if condition.vector is None else self._table.new_zeros(rows, width)
        self._tokens = self._table.new_zeros(rows, self._num_tokens, width)
        self.restart(condition)

    @torch.inference_mode()
    def restart(self, condition: Condition) -> None:
        """Begins as many new images in the same memory.

        Raises:
            InputError: only one of the conditions, this and that at the start, has a vector.
        """
        vector, tokens = condition
        if (vector is None) != (self._vector is None):
            raise InputError(VECTOR_AT_TIMES)
        self.step, self.slot = 0, 0
        self._spatial_length, self._depth_length = 0, 0
        if self._vector is not None and vector is not None:
            self._vector[: self.batch] = vector
            for transformer in (self._spatial_transformer, self._depth_transformer):
                transformer.condition(self._vector)
        if tokens is not None:
            self._tokens[: self.batch] = tokens
        for first in range(0, self._num_tokens, MOST_AT_ONCE):
            self._spatial_transformer(self._tokens[:, first : first + MOST_AT_ONCE], first)

    @property
    def slot_type(self) -> SlotType:
        """What the next code is."""
        return self.prior.ordering.steps[self.step][self.slot]

    @property
    def layer(self) -> int:
        """Number of the next code's layer over all groups, coarse to fine."""
        return self._first_layer[self.slot_type.group] + self.slot_type.layer

    @torch.inference_mode()
    def next_logits(self) -> Float[Tensor, "batch codes"]:
        """Logits of the next code; computes only what was appended since the last call."""
        step, slot = self.step, self.slot
        while self._spatial_length <= step:
            first = self._spatial_length
            last = min(first + MOST_AT_ONCE, step + 1)
            inputs = self.prior.spatial_inputs(
                self._contents, self._vector, first, last, self._parent_projection
            )
            hidden = self._spatial_transformer(inputs, self._num_tokens + first)
            self._start_of_step = hidden[:, -1]
            self._spatial_length = last
        inputs = torch.stack(
            [self._depth_input(earlier) for earlier in range(self._depth_length, slot + 1)], dim=1
        )
        hidden = self._depth_transformer(inputs, self._depth_length)[:, -1]
        self._depth_length = slot + 1
        return self._outputs[self.layer](hidden)[: self.batch]

    @torch.inference_mode()
    def append(self, codes: Int[Tensor, " batch"]) -> None:
        """Fixes the next code of every image, whether or not its logits were asked for."""
        rows = self._first_row[self.step][self.slot] + codes
        self._embeddings[:, self.slot] = nn.functional.embedding(rows, self._table)
        self.slot += 1
        if self.slot == len(self.prior.ordering.steps[self.step]):
            summary = self.prior.summarize(self._embeddings[:, : self.slot])
            self._contents[:, self.step + 1] = summary
            self.step, self.slot = self.step + 1, 0
            self._depth_length = 0

    @torch.inference_mode()
    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Goes on with these rows in place of all; only between steps.

        A row may be given several times. Rows that take each other's place must share a condition.
        """
        assert self.slot == 0, "a step is half done"
        self._contents[: self.batch] = self._contents[rows]
        self._spatial_transformer.reorder(rows, self._num_tokens + self._spatial_length)

    def _depth_input(self, slot: int) -> Tensor:
        """What `Prior.depth_inputs` gives at one slot of the present step."""
        slot_embedding = self.prior.slot_embedding[self._slot_type[self.step][slot]]
        if slot == 0:
            gain = self._spatial_transformer.gain
            return torch.addcmul(slot_embedding, self._start_of_step, gain)
        first = self._first_predecessor[slot]
        if first == slot - 1:
            return self._embeddings[:, first] + slot_embedding
        return self._embeddings[:, first:slot].sum(1) + slot_embedding


def _first_predecessors(step: list[SlotType]) -> list[int]:
    """First of the codes that each depth input sums: those of the position just before."""
    positions = [slot[:2] for slot in step]
    return [0, *(positions.index(position) for position in positions[:-1])]
