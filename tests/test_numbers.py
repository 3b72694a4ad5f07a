"""Numbers: short versions of the counted trials, and what the watch says."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipelines.run.checkpoints import TrainingState
from pipelines.training.divergence import DivergenceError, NonFiniteWatch
from tests.faults import numbers


def test_poisoned_runs_stop_and_seeds_fix_images(tmp_path: Path) -> None:
    tally = numbers.run(tmp_path, 10, seed=1)
    assert tally.tried == 10
    assert tally.lost == 0, tally.notes


def test_bf16_ends_near_fp32(tmp_path: Path) -> None:
    assert numbers.precision_problem(0, tmp_path, num_steps=60) == ""


def test_the_first_step_is_named_whenever_one_looks(tmp_path: Path) -> None:
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    for step in range(1, 5):
        loss = math.inf if step == 2 else 1.0
        variance = math.nan if step > 2 else 1.0
        watch.note(step, {"loss": torch.tensor(loss), "s": torch.tensor([0.0, variance])})
    (tmp_path / "state" / "step_00000001").mkdir(parents=True)
    with pytest.raises(DivergenceError, match=r"^step 2: loss is inf; .*/step_00000001; lower "):
        watch.check()


def test_finite_numbers_go_on(tmp_path: Path) -> None:
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    watch.note(1, {"loss": torch.tensor(3e38), "s": torch.tensor([-1e-45])})
    watch.check()


@pytest.mark.parametrize("place", ["a", "a_ema", "b_optimizer"])
def test_a_state_that_is_not_finite_is_refused_by_name(place: str, tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1, 2]), "b": torch.tensor([1.0, math.nan])}
    sound = {"a": torch.tensor([1, 2])}
    state = TrainingState(
        7,
        {part: tensors if part == place else sound for part in ("a", "a_ema", "b_optimizer")},
    )
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    with pytest.raises(DivergenceError, match=rf"^step 7: {place}\.b is not finite; there is"):
        watch.check_state(state)
    watch.check_state(TrainingState(7, {"a": sound}))
