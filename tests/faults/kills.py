"""Training is killed at random moments, or asked to stop, and goes on with the same command.

Four kinds of runs, each stage with one process and with two, take turns. Each run ends suddenly
one to three times: by SIGKILL, or one time in four by SIGTERM or Ctrl-C. Every tenth round is of
new interpreters, or of all that torchrun has started. Then it goes on to its end, and must equal a
run that nobody has disturbed, bit for bit.
"""

import contextlib
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.jobs import PATIENCE, Job, error_lines
from tests.faults.runs import TOTAL_STEPS, Stage, TinyRun, new_run, wrong_end

NUM_TRIALS = 40
KINDS: tuple[tuple[Stage, int], ...] = (
    ("tokenizer", 1),
    ("prior", 1),
    ("tokenizer", 2),
    ("prior", 2),
)


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Takes a run through its ends."""
    stage, num_processes = KINDS[number % len(KINDS)]
    is_real = number // len(KINDS) % 10 == 9
    run = new_run(folder, "disturbed", stage)
    for _ in range(generator.integers(1, 4)):
        job = Job(*run.command, num_processes, is_real=is_real)
        is_asked = generator.integers(4) == 0
        moments = (stepping, saving) if is_asked else (starting, stepping, saving, saving)
        if not moments[generator.integers(len(moments))](run, job, generator):
            complaint = job.failure()
        elif is_asked:
            complaint = _stop(run, job, generator)
        else:
            job.signal(signal.SIGKILL)
            complaint = "a killed process did not end" if None in job.wait() else ""
        if complaint:
            return f"{stage}, {num_processes} processes: {complaint}"
    return wrong_end(run, num_processes=num_processes)


# Moments: each waits for its own, and tells whether the job is then still running


def starting(run: TinyRun, job: Job, generator: np.random.Generator) -> bool:
    """Within the first half second."""
    time.sleep(generator.uniform(0, 0.5))
    return job.is_running()


def stepping(run: TinyRun, job: Job, generator: np.random.Generator) -> bool:
    """Some changes of metrics.jsonl later, at any moment of a step; first, lines are taken back."""
    path = run.output_dir / "metrics.jsonl"
    first = int(generator.integers(1, 7))
    seen: set[int] = set()

    def has_gone_on() -> bool:
        if path.exists():
            seen.add(path.stat().st_size)
        return len(seen) > first

    return _wait_for(has_gone_on, job, generator.uniform(0, 0.1))


def saving(run: TinyRun, job: Job, generator: np.random.Generator) -> bool:
    """While a checkpoint or the model is being written."""
    patterns = ("state/.step_*.tmp", "model/.*tmp*", "state/.step_*.tmp/*optimizer.safetensors")
    pattern = patterns[generator.integers(len(patterns))]
    started = time.time()

    def is_written() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it has its name by now
            return any(own.stat().st_ctime > started for own in run.output_dir.glob(pattern))
        return False

    return _wait_for(is_written, job, generator.uniform(0, 0.01))


def _wait_for(condition: Callable[[], bool], job: Job, seconds_more: float) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and job.is_running():
        if condition():
            time.sleep(seconds_more)
            return job.is_running()
        time.sleep(0.001)
    return False


def _stop(run: TinyRun, job: Job, generator: np.random.Generator) -> str:
    """Asks all processes, or one of them, to stop."""
    number = (signal.SIGTERM, signal.SIGINT)[generator.integers(2)]
    step = run.last_step()
    asks_one = not job.is_real and generator.integers(2)
    job.signal(number, [int(generator.integers(len(job.processes)))] if asks_one else None)
    statuses = job.wait()
    output = job.output()
    newest = max((own.name for own in run.states()), default="")
    if set(statuses) <= {0, 130} and newest == f"step_{TOTAL_STEPS:08d}":
        return ""  # the last step was over already; what is there will be compared
    found = re.search(r"stopped and saved at step (\d+); run the same command to go on", output)
    if found is None or not (job.is_real or set(statuses) == {130}):  # torchrun has its own
        return f"after {number.name} exit {statuses}: {error_lines(output)}"
    # One step for the line that was not yet in metrics.jsonl, one for the step under way.
    if not step <= int(found[1]) <= step + 2:
        return f"{number.name} in step {step + 1} stopped at step {found[1]}"
    return ""
