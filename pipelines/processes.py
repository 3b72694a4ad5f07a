"""Seeds, shares, sums and gathers over the processes of a run."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed

from pipelines.config import TrainingConfig
from tokenizer.storage.errors import InputError

T = TypeVar("T")


class CommonInputError(InputError):
    """What all processes know of: one of them tells the user."""


def new_accelerator(**options: Any) -> Accelerator:
    """The processes of a command: one, or those that `accelerate launch` or `torchrun` started.

    Raises:
        InputError: a launcher started several that do not find each other.
    """
    # Without `cpu`, processes that torchrun starts on a machine without GPU stay strangers.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    world = os.environ.get("WORLD_SIZE", "1")
    if str(accelerator.num_processes) != world:
        raise InputError(
            f"WORLD_SIZE must be {accelerator.num_processes}, the processes that "
            f"Accelerate sees, got {world}"
        )
    return accelerator


def bar_disabled(accelerator: Accelerator) -> bool | None:
    """Whether tqdm draws no bar: None leaves it to whether there is a terminal."""
    return None if accelerator.is_main_process else True


def is_lost_partner(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended, or is silent."""
    # gloo raises a bare RuntimeError, led by the path of its source.
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Does something on all processes, and fails on all if one cannot.

    Raises:
        CommonInputError: what the first of those that failed has to say.
    """
    problem, result = "", None
    try:
        result = action()
    except InputError as error:
        if accelerator.num_processes == 1:
            raise
        problem = str(error)
    if accelerator.num_processes > 1:
        problems = [own for own in gather_object([problem]) if own]
        if problems:
            raise CommonInputError(problems[0])
    return cast(T, result)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes ask together."""
    # Not by its class: what defines that takes a second to import.
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that may be sharded, without gradient; the same memory."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share.detach()


def seed_everything(*numbers: int) -> None:
    """Seeds torch's generators by a mixture of the numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # without what it puts down for a GPU that may come, ten times the work
        torch.default_generator.manual_seed(seed)


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Elementwise sum, on the CPU and in the tensor's own precision."""
    if accelerator.num_processes == 1:
        return tensor.cpu()
    total: Tensor = accelerator.reduce(tensor.to(accelerator.device), "sum")
    return total.cpu()


def own_share(accelerator: Accelerator, count: int) -> np.ndarray:
    """Items in [0, count) of this process: every item belongs to exactly one."""
    return np.arange(accelerator.process_index, count, accelerator.num_processes)


def batch_size_without_gradient(config: TrainingConfig, accelerator: Accelerator) -> int:
    """Images at a time in validation and encoding: cut by what saves memory in training.

    Without a gradient more of them fit, as the activations of one layer at a time are kept.
    """
    num_parts: int = accelerator.num_processes * config.gradient_accumulation_steps
    return min(4 * config.batch_size // num_parts, 250)


def gather_shares(accelerator: Accelerator, rows: Tensor, count: int) -> Tensor:
    """Puts the rows for `own_share` of each process into the order of [0, count), on the CPU."""
    if accelerator.num_processes == 1:
        return rows.cpu()
    world = accelerator.num_processes
    longest = -(-count // world)
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype, device=accelerator.device)
    padded[: len(rows)] = rows.to(accelerator.device)
    gathered: Tensor = accelerator.gather(padded)
    by_rank = gathered.cpu().view(world, longest, *rows.shape[1:])
    ordered: Tensor = by_rank.transpose(0, 1).flatten(0, 1)
    return ordered[:count]
