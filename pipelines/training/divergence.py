"""Stops a run whose numbers are no longer finite, naming the step at which it happened."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.processes import local
from pipelines.run.checkpoints import TrainingState

NEVER = 2**62


class DivergenceError(ArithmeticError):
    """A number is no longer finite; the message says which, where and what to change."""


class NonFiniteWatch:
    """Remembers the first step at which each number was not finite.

    `note` is called for every micro-batch and makes no host wait for its device; `check` waits,
    and is called before anything is logged, validated or saved. All processes must call it.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path) -> None:
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._names: list[str] = []
        self._first_step = torch.empty(0)
        self._value = torch.empty(0)

    def note(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Looks at the numbers of a step; the same names each time."""
        device = self._accelerator.device
        parts = {name: tensor.detach().flatten() for name, tensor in numbers.items()}
        values = torch.cat(
            [part.to(device, torch.float32, non_blocking=True) for part in parts.values()]
        )
        if not self._names:
            self._names = [name for name, part in parts.items() for _ in range(len(part))]
            self._first_step = torch.full(values.shape, NEVER, device=device)
            self._value = torch.zeros_like(values)
        is_new = ~values.isfinite() & (self._first_step == NEVER)
        self._first_step = torch.where(is_new, step, self._first_step)
        self._value = torch.where(is_new, values, self._value)

    def check(self) -> None:
        """Looks at what was noted, on all processes.

        Raises:
            DivergenceError: a number was not finite.
        """
        first_steps, values = self._first_step[None], self._value[None]
        if self._accelerator.num_processes > 1:
            first_steps, values = map(self._accelerator.gather, (first_steps, values))
        step = int(first_steps.min())
        if step == NEVER:
            return
        rows, columns = (first_steps == step).nonzero(as_tuple=True)
        found = zip(columns.tolist(), values[rows, columns].tolist(), strict=True)
        problems = dict.fromkeys(f"{self._names[column]} is {value}" for column, value in found)
        self._stop(step, ", ".join(problems))

    def check_state(self, state: TrainingState) -> None:
        """Looks at all that is about to be saved.

        Raises:
            DivergenceError: a weight or a moment of the optimizer is not finite.
        """
        tensors = {
            f"{part}.{name}": tensor
            for part, named in state.tensors.items()
            for name, tensor in named.items()
        }
        device = self._accelerator.device
        is_finite = torch.stack(
            [local(tensor).isfinite().all().to(device) for tensor in tensors.values()]
        )
        if self._accelerator.num_processes > 1:  # each may hold other shares
            is_finite = self._accelerator.gather(is_finite[None]).all(0)
        for name, is_sound in zip(tensors, is_finite.tolist(), strict=True):
            if not is_sound:
                self._stop(state.step, f"{name} is not finite")

    def _stop(self, step: int, problem: str) -> None:
        states = sorted((self._output_dir / "state").glob("step_*"))
        kept = f"the last good checkpoint is {states[-1]}" if states else "there is no checkpoint"
        raise DivergenceError(
            f"step {step}: {problem}; {kept}; lower training.learning-rate and start anew in "
            "another run-dir"
        )
