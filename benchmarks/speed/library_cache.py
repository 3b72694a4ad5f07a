"""Generation code by code with the growing cache of x-transformers: what ours is compared with."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.ordering import SlotType
from prior.transformer import Prior


class LibraryCache:
    """`prior.IncrementalDecoder` with the forward and the cache of x-transformers.

    That cache grows by concatenation and rotates all keys anew at each step.

    Args:
        prior: An unconditional prior; its weights must not change meanwhile.
        batch: Number of images.
    """

    def __init__(self, prior: Prior, batch: int) -> None:
        self.prior = prior
        self.step, self.slot = 0, 0
        self._table = prior.embedding.table()
        width, ordering = self._table.shape[1], prior.ordering
        self._contents = self._table.new_zeros(batch, ordering.num_steps + 1, width)
        self._contents[:, 0] = prior.start
        self._values = self._table.new_zeros(batch, 1, ordering.num_slots + 1, width)
        self._spatial_cache: Any = None
        self._spatial_length = 0
        self._depth_cache: Any = None
        self._depth_length = 0

    @property
    def slot_type(self) -> SlotType:
        """What the next code is."""
        return self.prior.ordering.steps[self.step][self.slot]

    def next_logits(self) -> Float[Tensor, "batch codes"]:
        """Logits of the next code; computes only what was appended since the last call."""
        prior, step, slot = self.prior, self.step, self.slot
        if self._spatial_length <= step:
            rotary: dict[str, Any] = {}
            if prior.rotary is not None:  # keys go back to step 0, queries do not
                rotary["rotary_pos_emb"] = (prior.rotary[:, : step + 1], 1.0)
            hidden, self._spatial_cache = prior.spatial_transformer(
                prior.spatial_inputs(self._contents, None, self._spatial_length, step + 1),
                **rotary,
                **_extends(self._spatial_cache, step + 1 - self._spatial_length),
            )
            self._values[:, 0, 0] = hidden[:, -1]
            self._spatial_length = step + 1
        inputs = prior.depth_inputs(self._values, step, step + 1, self._depth_length, slot + 1)
        hidden, self._depth_cache = prior.depth_transformer(
            inputs.flatten(0, 1), **_extends(self._depth_cache, slot + 1 - self._depth_length)
        )
        self._depth_length = slot + 1
        return prior.project(hidden[:, -1], self.slot_type.group, self.slot_type.layer)

    def append(self, codes: Int[Tensor, " batch"]) -> None:
        """Fixes the next code of every image, whether or not its logits were asked for."""
        row = self.prior.embedding.first_row[self.step, self.slot]
        self._values[:, 0, self.slot + 1] = nn.functional.embedding(row + codes, self._table)
        self.slot += 1
        if self.slot == len(self.prior.ordering.steps[self.step]):
            self._contents[:, self.step + 1] = self.prior.summarize(self._values[:, 0, 1:])
            self._values.zero_()
            self.step, self.slot = self.step + 1, 0
            self._depth_cache, self._depth_length = None, 0


def _extends(cache: Any, num_new: int) -> dict[str, Any]:
    """Arguments that let a transformer take `num_new` inputs after those of `cache`."""
    return {
        "cache": cache,
        "cache_age": num_new,
        "input_not_include_cache": True,
        "return_intermediates": True,
    }
