"""Commands in processes of their own, which find the slow imports done, and their sudden ends."""

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

import torch

PATIENCE = 300.0
"""Seconds for what takes one or two; a machine may be slow."""
NOBODY = 65534
"""A user who may write nowhere, on most systems."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pipelines.train_tokenizer", "pipelines.train_prior", "pipelines.evaluate"]
)


class Job:
    """`python -m module arguments` in one process, or in several that share the work (gloo).

    Args:
        module: what `python -m` takes.
        arguments: of the command.
        folder: for the output of each process.
        num_processes: of the run.
        file_size: no file may exceed it; stands for a disk without space.
        user: who runs it, in place of the present one.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        num_processes: int = 1,
        file_size: int | None = None,
        user: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"output_{rank}.txt" for rank in range(num_processes)]
        port = _free_port()
        self.processes: list[BaseProcess] = []
        for rank, output in enumerate(self.outputs):
            output.unlink(missing_ok=True)
            environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            if num_processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            process = _context.Process(
                target=run_command,
                args=(module, [*arguments], output, environment, file_size, user),
            )
            process.start()
            self.processes.append(process)

    def is_running(self) -> bool:
        """Whether all processes are."""
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to some processes, or to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            process = self.processes[rank]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, patience: float = PATIENCE) -> list[int | None]:
        """Exit statuses, negative after a signal; None for a process that had not ended."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def output(self, rank: int = 0) -> str:
        """What a process has written, on both channels."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""


class RealJob:
    """The same from a new interpreter, or from torchrun where there are several processes."""

    def __init__(
        self, module: str, arguments: Sequence[str], folder: Path, num_processes: int = 1
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        launcher = []
        if num_processes > 1:
            launcher = ["torch.distributed.run", "--nproc-per-node", str(num_processes)]
            launcher += ["--master-port", str(_free_port()), "-m"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self.path = folder / "output.txt"
        with self.path.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, module, *arguments],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        """Whether the command is."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the launcher and to all that it started."""
        if self.is_running():
            # torchrun's workers have sessions of their own: they would outlive its death.
            for pid in (self._process.pid, *_descendants(self._process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, patience: float = PATIENCE) -> list[int | None]:
        """The exit status; None if it had not ended."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self._process.wait()
            return [None]
        return [self._process.returncode]

    def output(self) -> str:
        """What has been written, on both channels."""
        return self.path.read_text()


def run(module: str, arguments: Sequence[str], folder: Path, num_processes: int = 1) -> None:
    """Runs a command that must succeed.

    Raises:
        RuntimeError: it does not; the message is its output.
    """
    job = Job(module, arguments, folder, num_processes)
    statuses = job.wait()
    if any(status != 0 for status in statuses):
        raise RuntimeError(f"{module} {' '.join(arguments)} gave {statuses}: {job.output()}")


def error_lines(output: str) -> list[str]:
    """What a command has written, without its progress bars."""
    lines = output.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "%|" not in line]


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for own in found:
        found += children.get(own, [])
    return found[1:]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_command(
    module: str,
    arguments: list[str],
    output: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    file_size: int | None = None,
    user: int | None = None,
) -> None:
    """`python -m module arguments` in this process; the arguments are those of `Job`."""
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if user is not None:
        os.setuid(user)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it will be run, not imported
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
