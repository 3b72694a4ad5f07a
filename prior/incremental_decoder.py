"""Generation code by code without computing anything twice."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.ordering import SlotType
from prior.static_transformer import LEAST_ROWS, Linear, StaticTransformer
from prior.transformer import Prior

MOST_AT_ONCE = 64
"""Steps of known codes that are taken together; bounds the memory of their attention."""


class PriorCache:
    """A prior in the middle of images: gives the logits of the next code, takes the code.

    Its logits equal those of `Prior.logits` up to rounding. All memory is taken at once and all
    weights are read at once: they must not change meanwhile. The prior must be in evaluation mode.

    Args:
        prior: The prior.
        labels: One class per image, `num_classes` being the null class; an unconditional prior
            reads only their number.
    """

    @torch.inference_mode()
    def __init__(self, prior: Prior, labels: Int[Tensor, " batch"]) -> None:
        ordering = prior.ordering
        self.prior = prior
        self.batch = len(labels)
        rows = self.batch
        if labels.device.type == "cpu":  # an image alone gets the bits that it has among others
            rows = max(rows, LEAST_ROWS)
        self._body = StaticTransformer(prior.body, rows, ordering.num_steps, prior.rotary)
        self._head = StaticTransformer(prior.head, rows, ordering.num_slots)
        parent = prior.parent_projection
        self._parent_projection = parent and Linear(parent.weight, None, rows)
        self._outputs = []
        for output in prior.outputs:
            assert isinstance(output, nn.Linear)
            self._outputs.append(Linear(output.weight * self._head.gain, output.bias, rows))
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
        self._condition = (
            self._table.new_zeros(rows, 1, width) if prior.config.num_classes else None
        )
        self.restart(labels)

    @torch.inference_mode()
    def restart(self, labels: Int[Tensor, " batch"]) -> None:
        """Begins as many new images in the same memory."""
        self.step, self.slot = 0, 0
        self._body_length, self._head_length = 0, 0
        if self._condition is not None:
            condition = self.prior.condition(labels)
            assert condition is not None
            self._condition.copy_(condition)

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
        while self._body_length <= step:
            first, last = self._body_length, min(self._body_length + MOST_AT_ONCE, step + 1)
            inputs = self.prior.body_inputs(
                self._contents, self._condition, first, last, self._parent_projection
            )
            self._start_of_step = self._body(inputs, first)[:, -1]
            self._body_length = last
        inputs = torch.stack(
            [self._head_input(earlier) for earlier in range(self._head_length, slot + 1)], dim=1
        )
        hidden = self._head(inputs, self._head_length)[:, -1]
        self._head_length = slot + 1
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
            self._head_length = 0

    def _head_input(self, slot: int) -> Tensor:
        """What `Prior.head_inputs` gives at one slot of the present step."""
        slot_embedding = self.prior.slot_embedding[self._slot_type[self.step][slot]]
        if slot == 0:
            return torch.addcmul(slot_embedding, self._start_of_step, self._body.gain)
        first = self._first_predecessor[slot]
        if first == slot - 1:
            return self._embeddings[:, first] + slot_embedding
        return self._embeddings[:, first:slot].sum(1) + slot_embedding


def _first_predecessors(step: list[SlotType]) -> list[int]:
    """First of the codes that each input of the head sums: those of the position just before."""
    positions = [slot[:2] for slot in step]
    return [0, *(positions.index(position) for position in positions[:-1])]
