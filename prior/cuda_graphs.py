"""Steps of drawing as CUDA graphs: captured once, then replayed without Python's part."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prior.ordering import CodeOrdering

CODES_PER_GRAPH = 256
"""Some 20,000 kernels: few launches, and no graph becomes slow to build."""


class CapturedSteps:
    """Draws fresh images of one batch size on a GPU; needs memory that stays in its place.

    Args:
        ordering: The order of the codes.
        draw_step: Fills one step of codes (B, steps, slots), given uniforms of the same shape and
            which slots are to be drawn; must have run before and must not wait for the device.
        codes: An example, all -1.
        uniforms: An example.
    """

    def __init__(
        self,
        ordering: CodeOrdering,
        draw_step: Callable[[int, Tensor, Tensor, Sequence[bool]], None],
        codes: Tensor,
        uniforms: Tensor,
    ) -> None:  # only on a GPU
        self._codes, self._uniforms = codes.clone(), uniforms.clone()
        is_drawn = [True] * ordering.num_slots
        steps_per_graph = max(1, CODES_PER_GRAPH // ordering.num_slots)
        self._graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
        pool = torch.cuda.graph_pool_handle()
        for first in range(0, ordering.num_steps, steps_per_graph):
            last = min(first + steps_per_graph, ordering.num_steps)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                for step in range(first, last):
                    draw_step(step, self._codes, self._uniforms, is_drawn)
            self._graphs.append((graph, last))

    def replay(
        self, codes: Tensor, uniforms: Tensor, progress: Callable[[int], None] | None
    ) -> Tensor:  # only on a GPU
        """Draws `codes`, all -1, by `uniforms`; `progress` gets the number of finished steps."""
        self._codes.copy_(codes)
        self._uniforms.copy_(uniforms)
        for graph, last in self._graphs:
            graph.replay()
            if progress is not None:
                progress(last)
        return self._codes.clone()
