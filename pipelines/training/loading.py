"""Batches one ahead: the next is put together while the present one is worked on.

Which items a micro-batch holds, and what is done with them, is a function of (seed, step): threads
and worker processes add no state to a run.
"""

import functools
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from torch.utils.data import DataLoader, Dataset

from pipelines.data.batches import BatchOrder
from pipelines.data.encoded_images import EncodedImages, TrainingImages
from tokenizer.storage.errors import InputError

_Loaded = tuple[TrainingImages, np.ndarray] | InputError


@runtime_checkable
class Loads(Protocol):
    """What of a stage is asked for here."""

    is_scattered: bool
    """Whether the order of the items is `BatchOrder.scattered()`."""

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> Any:
        """What the host knows of these training items."""


@runtime_checkable
class ReadsEncoded(Protocol):
    """A stage whose training images are decoded anew each time."""

    encoded: EncodedImages | None
    """None: its items lie in memory maps."""

    def loaded(self, images: torch.Tensor, is_flipped: np.ndarray) -> Any:
        """What `load` gives, of images that are decoded."""


def loading(
    stage: Loads,
    order: BatchOrder,
    steps: Sequence[int],
    num_parts: int,
    device: torch.device,
) -> Iterator[Callable[[], Any]]:
    """Tasks that load the stage's micro-batches of `steps`, `num_parts` of each.

    Raises:
        InputError: in a task: an image is unreadable, or a worker process was lost.
    """
    if stage.is_scattered:
        order = order.scattered()
    parts = _MicroBatches(order, steps, num_parts)
    if isinstance(stage, ReadsEncoded) and stage.encoded is not None:
        encoded = stage.encoded
        batches = _decoding(encoded, parts)

        def load_next() -> Any:
            images, is_flipped = _next(batches)
            encoded.note_unreadable(images.unreadable)
            return for_device(stage.loaded(images.images, is_flipped), device)

        for _ in range(len(parts)):
            yield load_next
        return

    def load_part(number: int) -> Any:
        _, items, is_flipped = parts[number]
        return for_device(stage.load(items, is_flipped), device)

    for number in range(len(parts)):
        yield functools.partial(load_part, number)


class _MicroBatches:
    """Step, items and mirroring of each micro-batch of a run, by its number."""

    def __init__(self, order: BatchOrder, steps: Sequence[int], num_parts: int) -> None:
        self.order, self.steps, self.num_parts = order, steps, num_parts

    def __len__(self) -> int:
        return len(self.steps) * self.num_parts

    def __getitem__(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        step = self.steps[number // self.num_parts]
        items, is_flipped = self.order.at(step)
        rows = slice(number % self.num_parts, None, self.num_parts)
        return step, items[rows], is_flipped[rows]


class _Decoded(Dataset[_Loaded]):
    """Decoded micro-batches, by their number; errors are values, which pass between processes."""

    def __init__(self, images: EncodedImages, parts: _MicroBatches) -> None:
        self.images, self.parts = images, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> _Loaded:
        step, items, is_flipped = self.parts[number]
        try:
            return self.images.training_images(items, self.parts.order.seed, step), is_flipped
        except InputError as error:
            return error


def _decoding(images: EncodedImages, parts: _MicroBatches) -> Iterator[_Loaded]:
    """Micro-batches in their order, decoded ahead by worker processes, if there are to be any."""
    num_workers = images.config.reading.num_workers
    loader = DataLoader(
        _Decoded(images, parts),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # otherwise it draws from the one that a step's noise is from
        # Otherwise whole memory maps would be sent to the workers.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Of threads at a fork; torch's own way, and the workers use none of what threads hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return iter(loader)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the workers, too; the process that trains decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch


def _next(batches: Iterator[_Loaded]) -> tuple[TrainingImages, np.ndarray]:
    try:
        batch = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"data.reading.num_workers: a worker process ended, perhaps for want of memory: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if isinstance(batch, InputError):
        raise batch
    return batch


def for_device(batch: Any, device: torch.device) -> Any:
    """Tensors in memory that a GPU can copy from without the host waiting; a CPU needs none."""
    if device.type != "cuda":
        return batch
    return recursively_apply(torch.Tensor.pin_memory, batch)  # only on a GPU


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device, without waiting for it if it comes from `for_device`."""
    return send_to_device(batch, device, non_blocking=True)
