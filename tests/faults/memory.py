"""Work under a limit on memory: with more data than fits, and with too little for a step.

The limit is the system's on a process's private data (RLIMIT_DATA), libraries included. Pages of
files that are read and written through memory maps do not count: the system takes them back when
it needs the room.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.command import TRAINING_MEMORY, parse_run, run_command
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.faults.tally import Tally

NUM_TRIALS = 20
LIMIT = 1_280 * 2**20
"""Bytes, of which the libraries alone take three quarters."""
IMAGE_SIZE = 64
NUM_IMAGES = 110_000
"""So many images take more than the whole limit."""
NUM_STEPS = 6

Trial = Callable[[], str]
"""What went wrong, or nothing."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    errors: list[str]
    """Lines on stderr that start with "error: ", and those of a traceback."""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """The first `num_trials` of the trials, of which those of starving runs have no end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes = []
    trials = itertools.chain(
        _on_more_data_than_fits(folder),
        _with_too_large_batches(folder),
        _starved_runs(folder, seed),
    )
    for name, trial in itertools.islice(trials, num_trials):
        complaint = trial()
        if complaint:
            notes.append(f"{name}: {complaint}")
    return Tally(num_trials, num_trials - len(notes), len(notes), notes)


def command(module: str, *arguments: object, limit: int | None = LIMIT) -> Ended:
    """Runs `python -m module arguments` with at most `limit` bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    process = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=restrict,
        # Each thread takes some megabytes for its stack, whatever it does.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    lines = re.split("[\r\n]+", process.stderr)
    return Ended(process.returncode, [own for own in lines if re.match(r"error: |Traceback", own)])


# More data than fits


def write_folder(folder: Path, num_images: int) -> Path:
    """Two classes of links to a few files: each is decoded and stored as if it were another."""
    rng = np.random.default_rng(0)
    sources = []
    for number in range(20):
        path = folder / "sources" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        sources.append(path)
    for number in range(num_images):
        path = folder / "images" / str(number % 2) / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % len(sources)], path)
    return folder / "images"


def data_options(images: Path, folder: Path) -> list[str]:
    """What makes a run of the preset `tiny` use the folder."""
    options = {
        "run-dir": folder / "run",
        "data.dataset": "folder",
        "data.root": images,
        "data.validation-share": "0.01",
        "data.image-size": IMAGE_SIZE,
        "data.cache-dir": folder / "cache",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def write_extractor(folder: Path) -> list[str]:
    """Options for a small untrained network to evaluate with."""
    torch.manual_seed(0)
    path = folder / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    options = {"kind": "timm", "model": "test_resnet", "weights": path, "image-size": 32}
    return [part for name, value in options.items() for part in (f"--extractor.{name}", str(value))]


def _on_more_data_than_fits(folder: Path) -> Iterator[tuple[str, Trial]]:
    def images() -> Path:
        made = folder / "images"
        return made if made.exists() else write_folder(folder, NUM_IMAGES)

    commands: dict[str, Callable[[], list[object]]] = {
        "check_data": lambda: [
            *(images(), "--image-size", IMAGE_SIZE, "--output", folder / "report.json")
        ],
        "train_tokenizer": lambda: ["tiny", *data_options(images(), folder)],
        "train_prior": lambda: ["tiny", "--run-dir", folder / "run"],
        "generate": lambda: [folder / "run", "--output-dir", folder / "generated"],
        "evaluate": lambda: [
            *(folder / "run", "--num-images", 1_000, "--batch-size", 20),
            *write_extractor(folder),
        ],
    }

    def trial(name: str) -> str:
        ended = command(f"pipelines.{name}", *commands[name]())
        return "" if ended == Ended(0, []) else str(ended)

    for name in commands:
        yield f"{name} on more data than fits", functools.partial(trial, name)


# Too large batches


def _with_too_large_batches(folder: Path) -> Iterator[tuple[str, Trial]]:
    many = 1_000_000
    commands: dict[str, tuple[list[object], str]] = {
        "train_tokenizer": (
            [
                *("tiny", *data_options(folder / "images", folder)),
                *("--run-dir", folder / "new", "--training.batch-size", many),
            ],
            TRAINING_MEMORY,
        ),
        "train_prior": (
            ["tiny", "--run-dir", folder / "copy", "--training.batch-size", many],
            TRAINING_MEMORY,
        ),
        "generate": (
            [
                *(folder / "run", "--output-dir", folder / "many"),
                *("--num-images", many, "--batch-size", many),
            ],
            "lower batch-size",
        ),
        "evaluate": (
            [
                *(folder / "run", "--what", "generation", "--num-images", 50_000),
                *("--batch-size", 50_000, "--extractor.kind", "timm", "--extractor.weights"),
                *(folder / "resnet.safetensors", "--extractor.model", "test_resnet"),
            ],
            "lower batch-size",
        ),
    }

    def trial(name: str) -> str:
        arguments, advice = commands[name]
        if name == "train_prior":
            shutil.copytree(folder / "run" / "tokenizer", folder / "copy" / "tokenizer")
        return _complaint(command(f"pipelines.{name}", *arguments), advice)

    for name in commands:
        yield f"{name} with a too large batch", functools.partial(trial, name)


def _complaint(ended: Ended, advice: str) -> str:
    """Whether a command ended with status 2 and one line that says what to change."""
    is_told = (
        ended.status == 2
        and len(ended.errors) == 1
        and ended.errors[0].startswith("error: out of memory")
        and advice in ended.errors[0]
    )
    return "" if is_told else str(ended)


# A run whose memory is taken by something else


def _starved_runs(folder: Path, seed: int) -> Iterator[tuple[str, Trial]]:
    draws = np.random.default_rng(seed)

    def options(run_dir: Path) -> list[object]:
        return [
            *("tiny", "--run-dir", run_dir, "--data.cache-dir", folder / "cache"),
            *("--training.total-steps", NUM_STEPS, "--training.checkpoint-interval", 1),
        ]

    def starve(number: int, accumulates: bool) -> str:
        expected = folder / "uninterrupted"
        if not expected.exists():
            command("pipelines.train_tokenizer", *options(expected), limit=None)
        run_dir = folder / f"starved{number}"
        step = int(draws.integers(1, NUM_STEPS))
        ended = command("tests.faults.memory", step, *options(run_dir), limit=None)
        complaint = _complaint(ended, TRAINING_MEMORY)
        newest = max(path.name for path in (run_dir / "tokenizer" / "state").glob("step_*"))
        if complaint or newest != f"step_{step:08d}":
            return complaint or f"starved in step {step}, but the checkpoint is {newest}"
        more = ["--training.gradient-accumulation-steps", 2] if accumulates else []
        ended = command("pipelines.train_tokenizer", *options(run_dir), *more, limit=None)
        if ended != Ended(0, []):
            return str(ended)
        if not accumulates and fingerprint(run_dir) != fingerprint(expected):
            return f"starved in step {step}, went on to another result"
        return ""

    for number, accumulates in enumerate(itertools.cycle([False, False, True])):
        yield f"starved run {number}", functools.partial(starve, number, accumulates)


def fingerprint(run_dir: Path) -> dict[str, Any]:
    """Weights, last state and metrics of a tokenizer's run, without its times."""
    stage = run_dir / "tokenizer"
    newest = max((stage / "state").glob("step_*"))
    files = sorted([*newest.glob("*.safetensors"), *(stage / "model").iterdir()])
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "metrics": [{k: v for k, v in own.items() if k != "images_per_second"} for own in lines],
    }


def leave_room(room: int) -> None:
    """Lets this process take so many bytes more of private data."""
    status = Path("/proc/self/status").read_text()
    (used,) = re.findall(r"VmData:\s+(\d+) kB", status)
    limit = int(used) * 1024 + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


class StarvedStage(TokenizerStage):
    """In one step, whatever asks for memory finds none left."""

    starved_step = -1

    def loss(
        self,
        name: str,
        modules: Mapping[str, torch.nn.Module],
        batch: torch.Tensor,
        step: int,
    ) -> Loss:
        """As ever, but for that step."""
        if step == self.starved_step:
            leave_room(0)
            # What a larger network would ask for; what was freed before is used up first.
            self.taken = [torch.empty(2**22) for _ in range(2**10)]
        return super().loss(name, modules, batch, step)


def train_starved(arguments: Sequence[str]) -> None:
    """Trains as the command does; the first argument is the step without memory, from 0."""

    def main() -> None:
        config = parse_run(TOKENIZER_PRESETS, "pipelines.train_tokenizer", arguments[1:])
        accelerator = make_accelerator(config)
        stage = StarvedStage(config, accelerator)
        stage.starved_step = int(arguments[0])
        train(stage, config, accelerator)

    run_command(main, TRAINING_MEMORY)


if __name__ == "__main__":
    train_starved(sys.argv[1:])
