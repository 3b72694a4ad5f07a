"""Commands and functions in processes of their own, their limits and their sudden ends."""

import contextlib
import functools
import multiprocessing
import os
import re
import resource
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

PATIENCE = 300.0
"""Seconds for what takes one or two; a machine may be slow."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["pipelines.train_tokenizer", "pipelines.train_prior", "pipelines.evaluate"]
)


class Job:
    """`python -m module arguments`, in one process or several that share the work (gloo).

    The processes find the slow imports done, unless the job is real: then each is a new
    interpreter, or torchrun starts them. `prepare` is called in each before the command.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[object],
        folder: Path,
        num_processes: int = 1,
        prepare: Callable[[], object] | None = None,
        is_real: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        command = [module, *map(str, arguments)]
        launcher = []
        if is_real and num_processes > 1:
            launcher = ["torch.distributed.run", f"--nproc-per-node={num_processes}"]
            launcher += [f"--master-port={port}", "-m"]
        self.is_real = is_real
        self.processes = []
        self._outputs = []
        for rank in range(1 if is_real else num_processes):
            output = folder / f"output_{rank}.txt"
            output.unlink(missing_ok=True)
            environment = rank_environment(rank, 1 if is_real else num_processes, port)
            process = context.Process(
                target=_run_command, args=(launcher, command, output, environment, prepare, is_real)
            )
            process.start()
            self.processes.append(process)
            self._outputs.append(output)

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to some processes, or to all, and to what they have started."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if not self.processes[rank].is_alive():
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.processes[rank].pid)
                # torchrun's workers have sessions of their own: they would outlive its death.
                for own in (process, *process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        own.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> list[int | None]:
        """Exit statuses, negative after a signal; None for a process that had not ended."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        statuses = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return statuses

    def output(self, rank: int = 0) -> str:
        """What a process has written, on both channels."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def failure(self) -> str:
        """Waits for the end; a complaint if it is no success."""
        statuses = self.wait()
        return f"exit {statuses}: {self.output()[-500:]}" if any(statuses) else ""

    def wrong_refusal(self, *texts: str) -> str:
        """Waits for the end; a complaint unless it is status 2 and one line with these texts."""
        statuses, lines = self.wait(), error_lines(self.output())
        is_one_line = len(lines) == 1 and lines[0].startswith("error: ")
        if statuses == [2] and is_one_line and all(text in lines[0] for text in texts):
            return ""
        return f"exit {statuses} in place of one line with {texts}: {lines[-3:]}"


PROGRESS = re.compile(
    r"%\||: comparing it with its hashes|^step [\d,]+ of |^a step takes |^starting the codebooks|"
    r"^[\d,]+ (images|parameters)|^stopping after this step|^cpu with|^classes: "
)


def error_lines(output: str) -> list[str]:
    """What a command has written, without what it tells of its progress."""
    lines = output.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not PROGRESS.search(line)]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def rank_environment(rank: int, num_processes: int, port: str) -> dict[str, str]:
    """Variables that a launcher would set for one of several processes on a CPU."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return environment


def leave_room(room: int) -> None:
    """Lets this process take so many bytes more of private data (not: pages of mapped files)."""
    status = Path("/proc/self/status").read_text()
    (used,) = re.findall(r"VmData:\s+(\d+) kB", status)
    limit = int(used) * 1024 + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def files_up_to(size: int) -> Callable[[], None]:
    """No file of the process may exceed a size; stands for a disk without space."""
    return functools.partial(
        resource.setrlimit, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
    )


def in_child(function: Callable[[], str], memory: int, seconds: int) -> str:
    """Runs a function in a fork of this process; its result, or how it ended without one.

    Args:
        function: to be run.
        memory: bytes of address space that it may take beyond what this process has.
        seconds: of processor time; ten times as long may pass on the clock.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # torch has threads, of which the child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            signal.alarm(10 * seconds)
            os.write(writing, function().encode(errors="replace")[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return outcome or f"ended with status {status}"


def _run_command(
    launcher: list[str],
    command: list[str],
    output: Path,
    environment: dict[str, str],
    prepare: Callable[[], object] | None,
    is_real: bool,
) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    if is_real:
        os.execv(sys.executable, [sys.executable, "-m", *launcher, *command])
    sys.argv = command
    sys.modules.pop(command[0], None)  # it will be run, not imported
    try:
        runpy.run_module(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
