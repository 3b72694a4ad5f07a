"""One of two or four processes (gloo) is killed at a random moment of a training run.

The others must end within a minute, with status 2 and one line, and the same command must go on.
"""

import signal
from pathlib import Path

import numpy as np

from tests.faults.jobs import Job, error_lines
from tests.faults.kills import stepping
from tests.faults.runs import Stage, new_run, wrong_end

NUM_TRIALS = 24
STAGES: tuple[Stage, Stage] = ("tokenizer", "prior")
MINUTE = 60.0


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Kills one process; if it comes too late, another of a new run."""
    stage, num_processes = STAGES[number % 2], (2, 4)[number // 2 % 2]
    run = new_run(folder, "bereaved", stage)
    job = Job(*run.command, num_processes)
    if not stepping(run, job, generator):
        return job.failure() or trial(folder, number, generator)
    victim = int(generator.integers(num_processes))
    job.signal(signal.SIGKILL, [victim])
    statuses = job.wait(MINUTE)
    for rank in set(range(num_processes)) - {victim}:
        lines = error_lines(job.output(rank))
        errors = [line for line in lines if line.startswith("error: another process of this run")]
        if statuses[rank] != 2 or len(errors) != 1 or any("Traceback" in line for line in lines):
            return f"exit {statuses[rank]} in place of one line: {lines[-3:]}"
    if num_processes == 2:
        return wrong_end(run, num_processes=2)
    # Sums of four may be added in another order when a run goes on.
    return Job(*run.command, num_processes).failure()
