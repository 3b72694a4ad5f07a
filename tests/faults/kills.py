"""Training is killed at random moments, or asked to stop, and goes on with the same command.

Four kinds of runs, each stage with one process and with two, take turns. A trial is one sudden end:
four of five by SIGKILL, the fifth by SIGTERM or Ctrl-C; now and then of a new interpreter, or of
all that torchrun has started. What a run loses is found out at the latest when it is done: it must
then equal one that nobody has disturbed, bit for bit.
"""

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines.run.checkpoints import load_state
from tests.faults.jobs import PATIENCE, Job, RealJob, error_lines
from tests.faults.runs import TOTAL_STEPS, Stage, TinyRun, differences, finished_run, new_run
from tests.faults.tally import Tally
from tokenizer.storage.errors import InputError

NUM_TRIALS = 80
KINDS: tuple[tuple[Stage, int], ...] = (
    ("tokenizer", 1),
    ("prior", 1),
    ("tokenizer", 2),
    ("prior", 2),
)
LAST_STATE = f"step_{TOTAL_STEPS:08d}"
ENDS_OF_REAL_COMMANDS = (4, 7)
"""Of twenty of a kind: a stop and a kill."""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Disturbs runs in `folder` until there are `num_trials` sudden ends."""
    notes: list[str] = []
    num_tried = num_lost = 0
    trained = finished_run(folder, "tokenizer")
    for number, (stage, num_processes) in enumerate(KINDS):
        wanted = len(range(number, num_trials, len(KINDS)))
        generator = np.random.default_rng((seed, number))
        first = 0
        while first < wanted:
            name = f"killed_{stage}_{num_processes}"
            shutil.rmtree(folder / name, ignore_errors=True)
            run = new_run(folder, name, stage, trained)
            num_ends, complaints = _disturb(run, num_processes, range(first, wanted), generator)
            if not complaints:
                whole = finished_run(folder, stage, num_processes, trained)
                complaints = differences(run, whole)
            first += num_ends
            num_tried += num_ends
            # Which end did the damage cannot be told.
            num_lost += num_ends if complaints else 0
            notes += complaints
    return Tally(num_tried, num_tried - num_lost, num_lost, notes)


def _disturb(
    run: TinyRun, num_processes: int, ends: range, generator: np.random.Generator
) -> tuple[int, list[str]]:
    """Takes a run to its end through some of these sudden ones; how many, and complaints."""
    num_ends = 0
    while True:
        end = ends.start + num_ends
        is_real = end in ends and end % 20 in ENDS_OF_REAL_COMMANDS
        job = (RealJob if is_real else Job)(
            run.module, run.arguments, run.run_dir / "output", num_processes
        )
        is_asked = end % 5 == 4
        reached = False
        if end in ends:
            moments = (stepping, stepping, _saving) if is_asked else (_starting, *MOMENTS)
            moment = moments[generator.integers(len(moments))]
            reached = moment(run, job, generator)
        if reached and is_asked:
            complaints = _stop(run, job, generator)
        elif reached:
            job.signal(signal.SIGKILL)
            complaints = [] if None not in job.wait() else ["a killed process did not end"]
            complaints += _state_complaints(run)
        else:
            statuses = job.wait()
            if any(statuses):
                return num_ends, [f"{run.output_dir}: exit {statuses}: {job.output()[-500:]}"]
            return num_ends, []
        num_ends += 1
        if complaints:
            return num_ends, complaints


# Moments


def _starting(run: TinyRun, job: Job | RealJob, generator: np.random.Generator) -> bool:
    time.sleep(generator.uniform(0, 0.5))
    return job.is_running()


def stepping(
    run: TinyRun, job: Job | RealJob, generator: np.random.Generator, earliest: int = 2
) -> bool:
    """Some changes of metrics.jsonl later, at any moment of a step; first, lines are taken back."""
    path = run.output_dir / "metrics.jsonl"
    first = int(generator.integers(earliest, 7))
    seen: set[int] = set()

    def has_gone_on() -> bool:
        if path.exists():
            seen.add(path.stat().st_size)
        return len(seen) > first

    if not _wait_for(has_gone_on, job):
        return False
    time.sleep(generator.uniform(0, 0.1))
    return job.is_running()


def _saving(run: TinyRun, job: Job | RealJob, generator: np.random.Generator) -> bool:
    """While a checkpoint or the model is being written."""
    patterns = ("state/.step_*.tmp", "model/.*tmp*", "state/.step_*.tmp/*_optimizer.safetensors")
    pattern = patterns[generator.integers(len(patterns))]

    def written() -> set[tuple[Path, int]]:
        found = set()
        for path in run.output_dir.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # it has its name by now
                found.add((path, path.stat().st_ctime_ns))
        return found

    abandoned = written()
    if not _wait_for(lambda: bool(written() - abandoned), job):
        return False
    time.sleep(generator.uniform(0, 0.01))
    return job.is_running()


MOMENTS = (stepping, _saving, _saving)


def _wait_for(condition: Callable[[], bool], job: Job | RealJob) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and job.is_running():
        if condition():
            return True
        time.sleep(0.001)
    return False


# What must hold after an end


def _stop(run: TinyRun, job: Job | RealJob, generator: np.random.Generator) -> list[str]:
    """Asks all processes, or one of them, to stop."""
    number = (signal.SIGTERM, signal.SIGINT)[generator.integers(2)]
    step = run.last_step()
    if isinstance(job, Job) and generator.integers(2):
        job.signal(number, [int(generator.integers(len(job.processes)))])
    else:
        job.signal(number)
    statuses = job.wait()
    output = job.output()
    if set(statuses) <= {0, 130} and (run.states()[-1:] or [run.run_dir])[0].name == LAST_STATE:
        return []  # the last step was over already; what is there will be compared
    found = re.search(r"stopped and saved at step (\d+); run the same command to go on", output)
    if found is None or (isinstance(job, Job) and set(statuses) != {130}):
        return [f"{run.output_dir}: after {number.name} exit {statuses}: {error_lines(output)}"]
    # One step for the line that was not yet in metrics.jsonl, one for the step under way.
    if not step <= int(found[1]) <= step + 2:
        return [f"{run.output_dir}: {number.name} in step {step + 1} stopped at step {found[1]}"]
    return _state_complaints(run)


def _state_complaints(run: TinyRun) -> list[str]:
    try:
        load_state(run.output_dir / "state")
    except InputError as error:
        return [str(error)]
    steps = [line["step"] for line in run.lines() if line["phase"] == "train"]
    if steps != list(range(1, len(steps) + 1)):
        return [f"metrics.jsonl of {run.output_dir} has the steps {steps}"]
    return []
