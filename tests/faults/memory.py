"""Work under a limit on memory: with more data than fits, and with too little for a step.

The limit is the system's on a process's private data (RLIMIT_DATA). Pages of files that are read
and written through memory maps do not count: the system takes them back when it needs the room.
"""

import functools
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.command import TRAINING_MEMORY, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.data.sources import load_images
from pipelines.options import parse_run
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.folder import load_run
from pipelines.training.losses import Loss
from tests.faults.jobs import Job, in_child, leave_room
from tests.faults.runs import CHECKPOINT_INTERVAL, TOTAL_STEPS, finished_run, new_run, wrong_end
from tests.tiny_runs import train_with

ROOM = (224 + 12 * min(32, os.cpu_count() or 1)) * 2**20
"""Bytes beyond what a process starts with; threads that decode take some for their stacks."""
LIMIT = functools.partial(leave_room, ROOM)
IMAGE_SIZE = 64
NUM_IMAGES = ROOM // (2 * IMAGE_SIZE**2)
"""Of three times as many bytes: half as much again as the room."""
MANY = 100_000
TOO_LARGE = ("train_tokenizer", "train_prior", "generate")
"""Not evaluate: within this room the images of a tiny run may fit, as features are not kept."""
NUM_TRIALS = 17


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Too much data in two trials, each command with a too large batch, then starving runs."""
    if number < 2:
        return _more_data_than_fits(folder, is_second=number == 1)
    if number < 2 + len(TOO_LARGE):
        return _too_large_batch(folder, TOO_LARGE[number - 2])
    return _starve(folder, int(generator.integers(TOTAL_STEPS)), number % 3 == 0)


def extractor_options(folder: Path) -> list[object]:
    """Options for a small untrained network to evaluate with."""
    path = folder / "resnet.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet").state_dict(), path)
    options = {"kind": "timm", "model": "test_resnet", "weights": path, "image-size": 32}
    return [part for name, value in options.items() for part in (f"--extractor.{name}", value)]


def _more_data_than_fits(folder: Path, is_second: bool) -> str:
    """Stage one, measured; or, after it, everything else."""
    run_dir, images, cache = folder / "run", folder / "images", folder / "many"
    measured = [run_dir, "--batch-size", 20, *extractor_options(folder), "--num-images", 40]
    measured += ["--what", "generation" if is_second else "reconstruction"]
    size = ["--image-size", IMAGE_SIZE, "--output", folder / "report.json"]
    second: dict[str, list[object]] = {
        "check_data": [images, *size],
        "train_prior": ["tiny", "--run-dir", run_dir],
        "generate": [run_dir, "--output-dir", run_dir / "images"],
        "evaluate": measured,
    }
    data = ["--data.dataset", "folder", "--data.root", images, "--data.validation-share", 0.01]
    data += ["--data.image-size", IMAGE_SIZE, "--data.cache-dir", cache]
    first = {"train_tokenizer": ["tiny", "--run-dir", run_dir, *data], "evaluate": measured}
    if not is_second:
        for path in (run_dir, images, cache):
            shutil.rmtree(path, ignore_errors=True)
        _write_images(images)
    for name, arguments in (second if is_second else first).items():
        job = Job(f"pipelines.{name}", arguments, folder / "output", prepare=LIMIT)
        if failure := job.failure():
            return f"{name}: {failure}"

    def read() -> str:
        config = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
        mapped = load_images(config.data, "train").images
        leave_room(ROOM)
        try:
            return f"{len(np.array(mapped))} images fit: the limit is none"
        except MemoryError:
            return "too large"

    return in_child(read, 64 * ROOM, seconds=60).removeprefix("too large")


def _write_images(folder: Path) -> None:
    """Two classes of links to a few files: each is decoded and stored as if it were another."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / str(number % 2) / f"{number:07d}.png"
        if number < 20:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        else:
            os.link(folder / str(number % 2) / f"{number % 20:07d}.png", path)


def _too_large_batch(folder: Path, name: str) -> str:
    """Whether a command ends with status 2 and one line that says what to lower."""
    run_dir = finished_run(folder, "prior").run_dir
    output = folder / "output"
    new = folder / "large"
    many = ["--num-images", MANY, "--batch-size", MANY]
    training = ["--training.batch-size", MANY, "--training.gradient-accumulation-steps", 1]
    stage = new_run(folder, "large", "tokenizer" if name == "train_tokenizer" else "prior")
    arguments = {
        "generate": [run_dir, "--output-dir", new / "images", *many],
    }.get(name, [*stage.command[1], *training])
    job = Job(f"pipelines.{name}", arguments, output, prepare=LIMIT)
    advice = TRAINING_MEMORY if name.startswith("train") else "lower batch-size"
    return job.wrong_refusal("error: out of memory", advice)


def _starve(folder: Path, step: int, accumulates: bool) -> str:
    """A run finds no memory in one step; the same command, or one with smaller parts, goes on."""
    run = new_run(folder, "starved", "tokenizer")
    module, arguments, output = run.command
    starved = Job("tests.faults.memory", [step, *arguments], output)
    if complaint := starved.wrong_refusal("error: out of memory", TRAINING_MEMORY):
        return complaint
    newest = max((int(own.name.removeprefix("step_")) for own in run.states()), default=0)
    if newest != step - step % CHECKPOINT_INTERVAL:
        return f"starved after step {step}, but the checkpoint is of step {newest}"
    if not accumulates:
        return wrong_end(run)
    return Job(module, [*arguments, "--training.gradient-accumulation-steps", 4], output).failure()


def train_starved(step: int, arguments: list[str]) -> None:
    """Trains as the command does, but in one step, from 0, whoever asks for memory finds none."""

    def starve(loss: Loss) -> Loss:
        leave_room(0)
        # What a larger network would ask for; what was freed before is used up first.
        taken = [torch.empty(2**22) for _ in range(2**10)]
        return loss._replace(minimized=loss.minimized + len(taken))

    def main() -> None:
        config = parse_run(TOKENIZER_PRESETS, "pipelines.train_tokenizer", arguments)
        train_with(config, step, starve)

    run_command(main, TRAINING_MEMORY)


if __name__ == "__main__":
    train_starved(int(sys.argv[1]), sys.argv[2:])
