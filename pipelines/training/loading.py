"""Batches one ahead: the next is put together while the present one is worked on.

Which items a micro-batch holds is a function of (seed, step): the thread adds no state to a run.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device

from pipelines.data.batches import BatchOrder


def loading(
    load: Callable[[np.ndarray, np.ndarray], Any],
    order: BatchOrder,
    steps: Iterable[int],
    num_parts: int,
    device: torch.device,
) -> Iterator[Callable[[], Any]]:
    """Tasks that load the micro-batches of `steps`, `num_parts` of each."""

    def load_part(step: int, part: int) -> Any:
        items, is_flipped = order.at(step)
        rows = slice(part, None, num_parts)
        return for_device(load(items[rows], is_flipped[rows]), device)

    for step in steps:
        for part in range(num_parts):
            yield functools.partial(load_part, step, part)


def for_device(batch: Any, device: torch.device) -> Any:
    """Tensors in memory that a GPU can copy from without the host waiting; a CPU needs none."""
    if device.type != "cuda":
        return batch
    return recursively_apply(torch.Tensor.pin_memory, batch)  # only on a GPU


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device, without waiting for it if it comes from `for_device`."""
    return send_to_device(batch, device, non_blocking=True)
