"""Several processes stop at the same step, whichever of them is asked."""

import re
import signal
import time
from pathlib import Path

import pytest

from pipelines.run.checkpoints import load_state
from tests.faults.jobs import PATIENCE, Job, error_lines
from tests.faults.runs import new_run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_save_when_one_of_them_is_asked_to_stop(
    number: signal.Signals, tmp_path: Path
) -> None:
    run = new_run(tmp_path, "run", "tokenizer")
    job = Job(*run.command, num_processes=2)
    deadline = time.monotonic() + PATIENCE
    while run.last_step() < 2 and job.is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    before = run.last_step()
    job.signal(number, [1])
    assert job.wait() == [130, 130], job.output()
    (line,) = error_lines(job.output())
    found = re.fullmatch(r"stopped and saved at step (\d+); run the same command to go on", line)
    assert found is not None
    step = int(found[1])
    # One step for the line that was about to be written, one for the step under way.
    assert before <= step <= before + 2
    assert error_lines(job.output(1)) == []
    state = load_state(run.output_dir / "state")
    assert state is not None
    assert state.step == step == run.last_step()
