"""Damaged checkpoints and caches, disks without space and folders that cannot be written.

Ten of eleven trials damage one file of a finished run, in one of many ways: it must be refused by
name, in one line, and the checkpoint before it must be taken only when it is named, and whole. The
rest train on a small disk that fills up, or where nothing may be written: one line, exit status 2,
and the same command must go on to the same end when there is space.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pipelines.config import TokenizerRunConfig
from pipelines.data.codes import extract_codes
from pipelines.data.sources import load_images
from pipelines.processes import new_accelerator
from pipelines.run.checkpoints import TrainingState, load_state
from pipelines.run.folder import load_run
from prior import Prior
from tests.faults.jobs import NOBODY, Job, error_lines
from tests.faults.runs import (
    CHECKPOINT_INTERVAL,
    TOTAL_STEPS,
    Stage,
    TinyRun,
    differences,
    finished_run,
    new_run,
)
from tests.faults.tally import Tally
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

NUM_TRIALS = 220
TRIALS_PER_DISK = 11
DAMAGES_PER_COMMAND = 20
MODEL_FILES = ("config.json", "model.safetensors")
PREVIOUS = f"step_{TOTAL_STEPS - CHECKPOINT_INTERVAL:08d}"


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Does its damage to copies of finished runs in `folder`."""
    trained = finished_run(folder, "tokenizer")
    wholes: dict[Stage, TinyRun] = {
        "tokenizer": trained,
        "prior": finished_run(folder, "prior", 1, trained),
    }
    previous = {stage: _state_before(whole, folder / "before") for stage, whole in wholes.items()}
    notes: list[str] = []
    num_lost = num_damages = 0
    for number in range(num_trials):
        generator = np.random.default_rng((seed, number))
        stage: Stage = ("tokenizer", "prior")[int(generator.integers(2))]
        shutil.rmtree(folder / "trial", ignore_errors=True)
        run = new_run(folder, "trial", stage, trained)
        if number % TRIALS_PER_DISK == TRIALS_PER_DISK - 1:
            is_full = number // TRIALS_PER_DISK % 4 != 0
            complaints = (_full_disk if is_full else _read_only)(run, wholes[stage], generator)
        else:
            num_damages += 1
            shutil.copytree(wholes[stage].output_dir, run.output_dir)
            # Damage may strike the cache, too; commands go on with the one that all share.
            own = run._replace(cache_dir=run.run_dir / "cache")
            shutil.copytree(run.cache_dir, own.cache_dir)
            runs_command = num_damages % DAMAGES_PER_COMMAND == 1
            complaints = _damage(own, previous[stage], generator)
            if runs_command:
                complaints = complaints or _way_out_complaints(run, wholes[stage])
        num_lost += bool(complaints)
        notes += [f"trial {number}: {complaint}" for complaint in complaints]
    return Tally(num_trials, num_trials - num_lost, num_lost, notes)


# Damaged files


def _damage(run: TinyRun, expected: TrainingState, generator: np.random.Generator) -> list[str]:
    model = run.output_dir / "model"
    paths = sorted(run.states()[-1].iterdir())
    paths += [model / name for name in MODEL_FILES]
    cached = sorted(run.cache_dir.glob("*/*")) + sorted(run.output_dir.glob("codes/*/*"))
    paths += cached
    path = paths[generator.integers(len(paths))]
    # A whole model from another moment would be a model, not damage.
    older = run.states()[0] / path.name if path.parent == run.states()[-1] else None
    _spoil(path, older, generator)
    if path in cached:
        complaints = _cache_complaints(run, path)
        shutil.rmtree(path.parent)  # the way out that the line names
        return complaints
    if path.parent == model:
        kind: type[Tokenizer] | type[Prior] = Tokenizer if run.stage == "tokenizer" else Prior
        try:
            kind.from_pretrained(model)
        except InputError as error:
            # A damaged config may first show in weights that do not fit it.
            return _naming_complaints(str(error), path.parent)
        return [f"{path} was loaded"]
    try:
        load_state(path.parents[1])
    except InputError as error:
        complaints = _naming_complaints(str(error), path)
        if f"--resume-from {PREVIOUS}" not in str(error):
            complaints.append(f"no way out: {error}")
    else:
        return [f"{path} was loaded"]
    previous = load_state(path.parents[1], PREVIOUS)
    if previous is None or not _equal(previous, expected):
        complaints.append(f"{PREVIOUS} did not come back as it was")
    return complaints


def _cache_complaints(run: TinyRun, damaged: Path) -> list[str]:
    """Opens the run's images and, if it has some, codes."""
    config = load_run(TokenizerRunConfig, run.run_dir / "tokenizer" / "config.json")
    data = config.data.model_copy(update={"cache_dir": run.cache_dir})
    try:
        splits = [load_images(data, "train"), load_images(data, "validation")]
        if run.stage == "prior":
            tokenizer = Tokenizer.from_pretrained(run.run_dir / "tokenizer" / "model")
            for images in splits:
                extract_codes(
                    tokenizer,
                    images,
                    run.output_dir / "codes",
                    new_accelerator(),
                    flips=False,
                    keeps_latents=False,
                )
    except InputError as error:
        return _naming_complaints(str(error), damaged)
    return [f"{damaged} was opened"]


def _spoil(path: Path, older: Path | None, generator: np.random.Generator) -> None:
    """Changes a file in one of six ways."""
    before = path.read_bytes()
    data = bytearray(before)
    while bytes(data) == before:
        kind = generator.integers(6)
        place = int(generator.integers(len(before)))
        if kind <= 1:
            data[place] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place : place + 512] = bytes(len(data[place : place + 512]))
        elif kind == 4:
            data += generator.bytes(1 + int(generator.integers(100)))
        elif older is not None:
            data = bytearray(older.read_bytes())
    path.write_bytes(data)


def _naming_complaints(message: str, path: Path) -> list[str]:
    is_told = str(path) in message and "\n" not in message
    return [] if is_told else [f"{path} is not named: {message}"]


def _way_out_complaints(run: TinyRun, whole: TinyRun) -> list[str]:
    """From the command line: a damaged state is refused, then taken to the end as asked."""
    newest = run.states()[-1]
    path = newest / f"{run.stage}_optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused = Job(run.module, run.arguments, run.run_dir / "output")
    complaints = _refusal_complaints(refused, str(newest))
    asked = Job(run.module, [*run.arguments, "--resume-from", PREVIOUS], run.run_dir / "output")
    statuses = asked.wait()
    if statuses != [0]:
        return [*complaints, f"going on from {PREVIOUS} gave {statuses}: {asked.output()}"]
    return complaints + differences(run, whole)


def _state_before(run: TinyRun, folder: Path) -> TrainingState:
    """The last state but one, read where there is no other."""
    path = run.states()[-2]
    shutil.copytree(path, folder / run.stage / path.name, dirs_exist_ok=True)
    state = load_state(folder / run.stage)
    assert state is not None
    return state


def _equal(one: TrainingState, other: TrainingState) -> bool:
    def flat(state: TrainingState) -> dict[str, torch.Tensor]:
        return {
            f"{part}.{name}": tensor
            for part, tensors in state.tensors.items()
            for name, tensor in tensors.items()
        }

    ours, theirs = flat(one), flat(other)
    return (
        one.step == other.step
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


# Disks


def _full_disk(run: TinyRun, whole: TinyRun, generator: np.random.Generator) -> list[str]:
    """Trains where there is too little space, then where there is enough."""
    size = int(generator.integers(20_000, 400_000))
    run.output_dir.mkdir(parents=True)
    with _small_disk(run.output_dir, size) as is_mounted:
        job = Job(
            run.module,
            run.arguments,
            run.run_dir / "output",
            file_size=None if is_mounted else min(size, 60_000),
        )
        complaints = _refusal_complaints(job, str(run.output_dir), "; make room there")
        if is_mounted:
            _mount("remount,size=16m", run.output_dir)
        return complaints + _end_complaints(run, whole)


def _read_only(run: TinyRun, whole: TinyRun, generator: np.random.Generator) -> list[str]:
    """Trains where nothing may be written, then where it may."""
    run.output_dir.mkdir(parents=True)
    with _small_disk(run.output_dir, 16_000_000) as is_mounted:
        if is_mounted:
            _mount("remount,ro", run.output_dir)
        else:
            run.output_dir.chmod(0o500)
        user = NOBODY if os.geteuid() == 0 and not is_mounted else None
        job = Job(run.module, run.arguments, run.run_dir / "output", user=user)
        complaints = _refusal_complaints(job, "run_dir: ")
        if is_mounted:
            _mount("remount,rw", run.output_dir)
        run.output_dir.chmod(0o700)
        return complaints + _end_complaints(run, whole)


def _refusal_complaints(job: Job, *texts: str) -> list[str]:
    statuses, lines = job.wait(), error_lines(job.output())
    is_told = len(lines) == 1 and lines[0].startswith("error: ")
    if statuses == [2] and is_told and all(text in lines[0] for text in texts):
        return []
    return [f"exit {statuses} in place of one line: {lines}"]


def _end_complaints(run: TinyRun, whole: TinyRun) -> list[str]:
    job = Job(run.module, run.arguments, run.run_dir / "output")
    statuses = job.wait()
    if statuses != [0]:
        return [f"going on gave {statuses}: {job.output()}"]
    return differences(run, whole)


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mounts a disk of its own at `folder`, if this system lets us; tells whether."""
    is_mounted = _mount(f"size={size}", folder, "-t", "tmpfs", "tmpfs")
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _mount(options: str, folder: Path, *source: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-o", options, *source, str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
