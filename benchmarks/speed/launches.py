"""Several processes: the ordinary command under a launcher, and a sharded prior."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.speed.measure import Budget
from pipelines.run.log import read_metrics

STEPS = {"tiny": 4, "cpu": 60, "gpu": 200}
ROUNDS = {"tiny": 1, "cpu": 3, "gpu": 1}
PRESETS = {"tiny": "tiny", "cpu": "shapes32-rsqvae", "gpu": "images128-rsqvae"}


def launcher(num_processes: int) -> list[str]:
    """What stands before the name of a module."""
    if num_processes == 1:
        return [sys.executable, "-m"]
    options = ["--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m"]


def processes(budget: Budget, num_processes: int = 2) -> dict[str, Any]:
    """Images/s of the ordinary command with one process and several; one thread each on a CPU.

    The global batch is the same. Runs alternate, also with those of the same model by torch alone,
    and of each the median of its log lines counts, without the first.
    """
    steps, preset = STEPS[budget], PRESETS[budget]
    rates: dict[int, list[float]] = {1: [], num_processes: []}
    bare: dict[int, list[float]] = {1: [], num_processes: []}
    with TemporaryDirectory() as folder:
        for number in range(ROUNDS[budget]):
            for count, own in rates.items():
                run_dir = Path(folder, f"{number}_{count}")
                options = {
                    "run-dir": run_dir,
                    "data.dataset": "shapes",
                    "data.num-images": 1_000,
                    "data.num-validation-images": 16,
                    "data.cache-dir": Path(folder, "cache"),
                    "training.total-steps": steps,
                    "training.log-interval": max(steps // 6, 1),
                    "training.validation-interval": 10**6,
                    "training.checkpoint-interval": 10**6,
                }
                arguments = [f"--{name}={value}" for name, value in options.items()]
                _run([*launcher(count), "pipelines.train_tokenizer", preset, *arguments])
                speeds = read_metrics(run_dir / "tokenizer", "train")["images_per_second"][1]
                own.append(float(statistics.median(speeds[1:])))
                if budget == "gpu":  # it knows no GPU
                    continue
                path = Path(folder, "bare.json")
                _run([*launcher(count), "benchmarks.speed.bare", preset, str(steps), str(path)])
                bare[count].append(json.loads(path.read_text()))
    one, several = (statistics.median(own) for own in rates.values())
    return {
        "preset": preset,
        "processes": num_processes,
        "images_per_second": {str(count): own for count, own in rates.items()},
        "bare_images_per_second": {str(count): own for count, own in bare.items() if own},
        "efficiency": several / (num_processes * one),
    }


def sharded_losses(num_processes: int = 2) -> dict[str, Any]:
    """What `benchmarks.speed.fsdp` writes with one process and with several."""
    found = {}
    with TemporaryDirectory() as folder:
        for count in (1, num_processes):
            path = Path(folder, f"{count}.json")
            _run([*launcher(count), "benchmarks.speed.fsdp", str(path)])
            found[count] = json.loads(path.read_text())
    losses = [own["losses"] for own in found.values()]
    difference = max(abs(one - other) for one, other in zip(*losses, strict=True))
    return {
        "runs": {str(count): own for count, own in found.items()},
        "largest_difference": difference,
    }


def _run(command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2_000:]
