"""Runs of two and four processes (gloo): one dies, or they share what cannot be shared equally.

Two of three trials kill one process of a training run at a random moment: the others must end
within a minute, with status 2 and one line, and the same command must go on. The third measures a
random number of images with several processes: the numbers must be those of one, which they are
not if an image is left out or counted twice.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from tests.faults import jobs
from tests.faults.jobs import Job, error_lines
from tests.faults.kills import stepping
from tests.faults.runs import Stage, TinyRun, differences, finished_run, new_run
from tests.faults.tally import Tally

NUM_TRIALS = 36
WORLDS = (2, 4)
MINUTE = 60.0


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Tries both in `folder`, with two and with four processes in turn."""
    trained = finished_run(folder, "tokenizer")
    notes: list[str] = []
    num_lost = 0
    for number in range(num_trials):
        generator = np.random.default_rng((seed, number))
        num_processes = WORLDS[number // 3 % len(WORLDS)]
        if number % 3 == 2:
            complaints = _measure(folder, trained, num_processes, generator)
        else:
            stage: Stage = ("tokenizer", "prior")[number % 3]
            complaints = _bereave(folder, stage, num_processes, trained, generator)
        num_lost += bool(complaints)
        notes += [f"trial {number}: {complaint}" for complaint in complaints]
    return Tally(num_trials, num_trials - num_lost, num_lost, notes)


# One of them dies


def _bereave(
    folder: Path,
    stage: Stage,
    num_processes: int,
    trained: TinyRun,
    generator: np.random.Generator,
) -> list[str]:
    """Kills one process of a run, which goes on from one trial to the next."""
    name = f"bereaved_{stage}_{num_processes}"
    run = new_run(folder, name, stage, trained)
    victim = int(generator.integers(num_processes))
    job = Job(run.module, run.arguments, run.run_dir / "output", num_processes)
    if not stepping(run, job, generator, earliest=1):
        statuses = job.wait()
        complaints = [] if not any(statuses) else [f"exit {statuses}: {job.output()[-500:]}"]
        if not complaints and num_processes == 2:
            complaints = differences(run, finished_run(folder, stage, num_processes, trained))
        shutil.rmtree(run.run_dir)
        return complaints or _bereave(folder, stage, num_processes, trained, generator)
    job.signal(signal.SIGKILL, [victim])
    statuses = job.wait(MINUTE)
    return [
        complaint
        for rank in range(num_processes)
        if rank != victim
        for complaint in _orphan_complaints(statuses[rank], job.output(rank))
    ]


def _orphan_complaints(status: int | None, output: str) -> list[str]:
    lines = error_lines(output)
    errors = [line for line in lines if line.startswith("error: another process of this run")]
    if status == 2 and len(errors) == 1 and not any("Traceback" in line for line in lines):
        return []
    return [f"exit {status} in place of one line: {lines[-3:]}"]


# They share what cannot be shared equally


def _measure(
    folder: Path, trained: TinyRun, num_processes: int, generator: np.random.Generator
) -> list[str]:
    """Evaluates a number of images that has no reason to be a multiple of anything."""
    weights = folder / "extractor.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet").state_dict(), weights)
    run = new_run(folder, f"measured_{num_processes}", "tokenizer")
    shutil.copytree(trained.output_dir, run.output_dir, dirs_exist_ok=True)
    count = int(generator.integers(20, 33))
    arguments = [str(run.run_dir), "--num-images", str(count), "--what", "reconstruction"]
    arguments += ["--extractor.kind", "timm", "--extractor.model", "test_resnet"]
    arguments += ["--extractor.weights", str(weights), "--extractor.image-size", "32"]
    numbers = []
    for world in (1, num_processes):
        jobs.run("pipelines.evaluate", arguments, run.run_dir / "output", world)
        path = run.run_dir / "evaluation" / "reconstruction.json"
        numbers.append(_numbers(json.loads(path.read_text())["metrics"]))
    if numbers[0].keys() == numbers[1].keys() and all(
        np.allclose(numbers[0][name], numbers[1][name], rtol=1e-5, atol=1e-6) for name in numbers[0]
    ):
        return []
    return [f"{count} images by 1 and by {num_processes} processes give {numbers}"]


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    # The bound draws its noise batch by batch.
    return {name: own["value"] for name, own in metrics.items() if name != "bound_bits_per_dim"}
