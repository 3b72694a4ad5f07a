"""Workers of one run under torchrun are killed, ten times, and nobody starts anything again.

torchrun replaces them, and the run goes on from its last checkpoint. At its end the weights are
those of a run that nobody has disturbed: bit for bit with two processes, else to rounding. Each
stage, with weights that each process holds (ddp) or that are shared out (fsdp), on two processes
and on three, takes its turn.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from pipelines.run.checkpoints import load_state
from tests.faults.jobs import PATIENCE, free_port
from tests.faults.runs import Stage, TinyRun, new_run

NUM_TRIALS = 8
NUM_KILLS = 10
STAGES: tuple[Stage, Stage] = ("tokenizer", "prior")
OPTIONS = ("--training.total-steps=90", "--training.batch-size=12")
"""Of which three processes get as many images as two; enough steps for ten lives."""


def trial(
    folder: Path, number: int, generator: np.random.Generator, num_kills: int = NUM_KILLS
) -> str:
    """Kills one process after the other."""
    stage, parallel = STAGES[number % 2], ("fsdp", "ddp")[number // 2 % 2]
    num_processes = (2, 3)[number // 4 % 2]
    whole = _finished(folder, stage, parallel, num_processes)
    run = new_run(folder, "replaced", stage)
    agent = _start(run, parallel, num_processes, num_kills)
    for kill in range(num_kills):
        worker = _one_at_work(run, agent, generator)
        if worker is None:
            return f"{stage}, {parallel}: ended before kill {kill + 1}: {_output(run)[-500:]}"
        worker.send_signal(signal.SIGKILL)
    if agent.wait(10 * PATIENCE):
        return f"{stage}, {parallel}: exit {agent.returncode}: {_output(run)[-500:]}"
    return _difference(run, whole, is_exact=num_processes == 2)


def _finished(folder: Path, stage: Stage, parallel: str, num_processes: int) -> TinyRun:
    """The measure of the others; made once."""
    name = f"elastic_{stage}_{parallel}_{num_processes}"
    if not (folder / name / stage / "model").exists():
        run = new_run(folder, name, stage)
        assert not _start(run, parallel, num_processes, 0).wait(PATIENCE), _output(run)
    return TinyRun(folder, name, stage)


def _start(
    run: TinyRun, parallel: str, num_processes: int, num_restarts: int
) -> "subprocess.Popen[bytes]":
    module, arguments, folder = run.command
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command += ["--rdzv-conf=last_call_timeout=1", f"--max-restarts={num_restarts}"]
    command += [f"--nproc-per-node={num_processes}", "-m", module, *map(str, arguments), *OPTIONS]
    # Otherwise new workers find the addresses of the killed ones, and wait for them.
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, f"--training.parallel={parallel}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _output(run: TinyRun) -> str:
    return (run.command[2] / "output.txt").read_text()


def _one_at_work(
    run: TinyRun, agent: "subprocess.Popen[bytes]", generator: np.random.Generator
) -> psutil.Process | None:
    """A worker at a random moment after the run has done a step more; None if it has ended."""
    path = run.output_dir / "metrics.jsonl"
    seen: set[tuple[int, int]] = set()
    first = int(generator.integers(2, 5))  # lines are taken back first
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and agent.poll() is None:
        if path.exists():
            status = path.stat()
            seen.add((status.st_ino, status.st_size))
        if len(seen) > first:
            time.sleep(generator.uniform(0, 0.1))
            workers = psutil.Process(agent.pid).children()
            return workers[int(generator.integers(len(workers)))] if workers else None
        time.sleep(0.001)
    return None


def _difference(run: TinyRun, whole: TinyRun, *, is_exact: bool) -> str:
    states = [load_state(own.output_dir / "state") for own in (run, whole)]
    found, expected = (own.tensors for own in states if own is not None)
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            other = found[part][name]
            if not torch.equal(other, tensor) if is_exact else not _is_near(other, tensor):
                return f"{run.output_dir}: {part}.{name} differs from {whole.output_dir}"
    return ""


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-4)
