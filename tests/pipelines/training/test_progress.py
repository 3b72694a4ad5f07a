"""What a run tells people."""

import logging
from typing import Any

import pytest
from accelerate import Accelerator

from pipelines.config import TrainingConfig
from pipelines.training import progress
from pipelines.training.progress import Progress


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lines of a run of so many steps that each take `seconds`, where there is no terminal."""
    caplog.set_level(logging.INFO)

    def tell(seconds: float, preset: str = "", steps: int = 1_000) -> list[str]:
        caplog.clear()
        clock = iter(range(10**6))
        monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds * next(clock))
        config = TrainingConfig(total_steps=steps, batch_size=8)
        with Progress(config, Accelerator(cpu=True), 0, "12 images", preset, 34) as run:
            for step in range(1, 5):
                run.note_step(step)
            run.tell(4, 0.5, 16.0)
        return caplog.messages

    return tell


def test_a_run_says_what_it_does_and_how_long_that_takes(told: Any) -> None:
    *start, time, last = told(1.0)
    assert start[1:] == ["12 images", "34 parameters, 1,000 steps of 8 images"]
    assert start[0].startswith("cpu with ")
    assert start[0].endswith("fp32, one process")
    assert time == "a step takes 1 s: 17 min to go"
    assert last == "step 4 of 1,000: loss 0.5, 16 images/s, 8 min to go"


@pytest.mark.parametrize("preset", ["images64-small", ""])
def test_over_a_day_it_names_the_steps_of_a_day_and_a_preset_for_a_cpu(
    told: Any, preset: str
) -> None:
    """After one step, where that takes long."""
    warning = told(100.0, preset)[4]
    assert "over a day, in which this machine does 864 steps (training.total-steps)" in warning
    assert warning.endswith(f"; the preset {preset} is made for a CPU" if preset else "steps)")
