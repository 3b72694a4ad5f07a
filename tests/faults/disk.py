"""Damaged checkpoints, models and caches, disks without space, folders that cannot be written.

Ten of eleven trials damage one file of a finished run: it must be refused by name, in one line,
and the way out that the line names must lead to the end of an undisturbed run. Damage in a cache
that keeps size and time must be found by its hash. The rest train on a small disk that fills up, or
where nothing may be written: one line, exit status 2, and the same command must go on to the same
end when there is space.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipelines.data.cache import verify_cache
from prior import Prior
from tests.faults.damage import spoiled
from tests.faults.jobs import Job, files_up_to
from tests.faults.runs import (
    CHECKPOINT_INTERVAL,
    TOTAL_STEPS,
    Stage,
    TinyRun,
    finished_run,
    new_run,
    wrong_end,
)
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

NUM_TRIALS = 110
STAGES: tuple[Stage, Stage] = ("tokenizer", "prior")
PREVIOUS = f"step_{TOTAL_STEPS - CHECKPOINT_INTERVAL:08d}"
NOBODY = 65534
"""A user who may write nowhere, on most systems."""


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Does damage to a copy of a finished run in `folder`, or trains where that cannot work."""
    stage = STAGES[number % 2]
    if number % 11 == 10:
        return (_read_only if number // 11 % 4 == 0 else _full_disk)(
            new_run(folder, "small", stage), generator
        )
    run = new_run(folder, "damaged", stage)
    shutil.copytree(finished_run(folder, stage).output_dir, run.output_dir)
    states = run.states()
    caches = run.cache_dir.glob("*/*") if stage == "tokenizer" else run.output_dir.glob("codes/*/*")
    files = [[*states[-1].iterdir()], [*(run.output_dir / "model").iterdir()], [*caches]]
    kind = int(generator.integers(3))
    path = sorted(files[kind])[generator.integers(len(files[kind]))]
    content = spoiled(path.read_bytes(), generator)
    if kind == 2 and generator.integers(2):
        return _hidden_complaint(run, path)
    if kind == 0 and generator.integers(5) == 0:  # of another moment
        content = (states[0] / path.name).read_bytes()
    path.write_bytes(content)
    return (_state_complaint, _model_complaint, _cache_complaint)[kind](run, path)


# Damaged files


def _state_complaint(run: TinyRun, path: Path) -> str:
    way_out = f"--resume-from {PREVIOUS}"
    complaint = Job(*run.command).wrong_refusal(str(path), way_out)
    return complaint or wrong_end(run, *way_out.split())


def _model_complaint(run: TinyRun, path: Path) -> str:
    kind: type[Tokenizer] | type[Prior] = Tokenizer if run.stage == "tokenizer" else Prior
    try:
        kind.from_pretrained(path.parent)
    except InputError as error:
        # A damaged config may first show in weights that do not fit it.
        if str(path.parent) not in str(error) or "\n" in str(error):
            return f"{path} is not named: {error}"
    else:
        return f"{path} was loaded"
    return wrong_end(run)  # which writes the model once more


def _cache_complaint(run: TinyRun, path: Path) -> str:
    complaint = Job(*run.command).wrong_refusal(str(path), str(path.parent))
    shutil.rmtree(path.parent)  # all share it, and it is made anew
    return complaint or wrong_end(run)


def _hidden_complaint(run: TinyRun, path: Path) -> str:
    """Size and time stay as they were: only the hashes tell, when they are asked."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    damages = dict(verify_cache(path.parent.parent))
    found = [entry for entry, damage in damages.items() if damage]
    shutil.rmtree(path.parent)
    if found != [path.parent] or str(path) not in damages[path.parent]:
        return f"{path} is not named: {damages}"
    return wrong_end(run)


# Disks


def _full_disk(run: TinyRun, generator: np.random.Generator) -> str:
    """Trains where there is too little space, then where there is enough."""
    size = int(generator.integers(20_000, 400_000))
    run.output_dir.mkdir(parents=True)
    with _small_disk(run.output_dir, size) as is_mounted:
        prepare = None if is_mounted else files_up_to(min(size, 60_000))
        job = Job(*run.command, prepare=prepare)
        complaint = job.wrong_refusal(str(run.output_dir), "; make room there")
        if is_mounted:
            _mount("remount,size=16m", run.output_dir)
        return complaint or wrong_end(run)


def _read_only(run: TinyRun, generator: np.random.Generator) -> str:
    """Trains where nothing may be written, then where it may."""
    run.output_dir.mkdir(parents=True)
    with _small_disk(run.output_dir, 16_000_000) as is_mounted:
        if is_mounted:
            _mount("remount,ro", run.output_dir)
        else:
            run.output_dir.chmod(0o500)
        is_mighty = os.geteuid() == 0 and not is_mounted
        prepare = functools.partial(os.setuid, NOBODY) if is_mighty else None
        complaint = Job(*run.command, prepare=prepare).wrong_refusal("run_dir: ")
        if is_mounted:
            _mount("remount,rw", run.output_dir)
        run.output_dir.chmod(0o700)
        return complaint or wrong_end(run)


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
