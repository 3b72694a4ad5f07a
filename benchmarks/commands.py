"""The project's commands as a benchmark runs them: once, with a record of command and time."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import commit


def run_command(run_dir: Path, module: str, options: str, num_threads: int | None) -> None:
    """Runs `python -m pipelines.MODULE OPTIONS`, unless `run_dir` says that it has finished.

    Output goes to MODULE.log in `run_dir`, command, commit and time to MODULE.done.json.

    Args:
        run_dir: folder of the run.
        module: the command.
        options: its command line.
        num_threads: None leaves it to torch.

    Raises:
        SystemExit: the command failed; its log is named.
    """
    record = run_dir / f"{module}.done.json"
    if record.exists():
        return
    command = f"python -m pipelines.{module} {options}"
    environment = os.environ.copy()
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (run_dir / f"{module}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)[1:]], stdout=log, stderr=log, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed, see {log.name}")
    metadata = {
        "command": command,
        "commit": commit(),
        "seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
    }
    record.write_text(json.dumps(metadata) + "\n")
