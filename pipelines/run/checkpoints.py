"""Everything a run needs to go on, in `state/`: named sets of tensors, and the step.

They are the weights, EMA and optimizer of each network. Random numbers, data order and learning
rates are functions of the step, so nothing else has to be kept. Only safetensors and JSON are
written and read. `state.json` is the manifest.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from pipelines.run.manifest import check_files, read_manifest, write_manifest
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, naming
from tokenizer.storage.untrusted import load_safetensors

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]

FORMAT = 2
"""Of what is written. Format 1 has no number in its manifest; it has the tensors `model`, `ema`
(empty if there is none) and `optimizer` (by number of the parameter)."""
SHARDED_FORMAT = 3
"""Of what several processes write in shares; see `pipelines/run/shards.py`."""

_NAME = re.compile(r"step_\d{8,}\Z", re.ASCII)


class TrainingState(NamedTuple):
    """A run between two steps."""

    step: int
    """Number of finished optimizer steps."""
    tensors: Mapping[str, Tensors]
    """By name of their file."""
    sources: Mapping[str, str] = MappingProxyType({})
    """Hashes of what the run learns from, by name."""
    metrics: str = ""
    """Hash of what metrics.jsonl holds up to this step."""
    format: int = FORMAT
    """In which it was read."""
    shards: Path | None = None
    """Folder of the shares where the tensors have no values yet."""


def save_state(folder: Path, state: TrainingState) -> None:
    """Writes `folder/step_NNNNNNNN`; of the others, only the one before it stays.

    The files lie under a temporary name until all are on the disk, so that a run killed at any
    moment finds the new state or the old one. What has this name already makes way by a rename.
    """
    temporary = begin_state(folder, state.step)
    try:
        for name, tensors in state.tensors.items():
            path = temporary / f"{name}.safetensors"
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            with naming(folder / _name(state.step)):
                safetensors.torch.save_file(contiguous, path)
        publish_state(folder, state)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin_state(folder: Path, step: int) -> Path:
    """An empty folder for the files of a state; removes what killed runs have left."""
    for abandoned in folder.glob(".step_*.tmp"):
        shutil.rmtree(abandoned)
    temporary = folder / f".{_name(step)}.tmp"
    temporary.mkdir(parents=True)
    return temporary


def publish_state(folder: Path, state: TrainingState, *, is_sharded: bool = False) -> None:
    """Gives the files of a state their name once they are whole; removes older states but one."""
    target = folder / _name(state.step)
    temporary = folder / f".{target.name}.tmp"
    replaced = folder / f".{target.name}.replaced.tmp"
    fields = {
        "format": SHARDED_FORMAT if is_sharded else FORMAT,
        "step": state.step,
        "sources": dict(state.sources),
        "metrics": state.metrics,
    }
    with naming(target):
        write_manifest(temporary / "state.json", fields)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    flush_to_disk(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    states = _states(folder)
    before = states[: states.index(target)][-1:]
    for needless in states:
        if needless not in (target, *before):
            shutil.rmtree(needless)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def load_state(
    folder: Path, fallback: str | None = None, *, in_shards: bool = False
) -> TrainingState | None:
    """The newest state, or None before the first.

    Args:
        folder: holds the states.
        fallback: name of an older state, which is taken if the newest is damaged.
        in_shards: whether tensors that were saved in shares stay on the disk.

    Raises:
        InputError: the newest state is damaged, and so is the fallback or there is none.
    """
    states = _states(folder)
    names = [state.name for state in states]
    if fallback is not None and fallback not in names:
        held = ", ".join(names) or "no checkpoint"
        raise InputError(f"resume_from must name a checkpoint in {folder}, got {fallback}: {held}")
    if not states:
        return None
    newest = states[-1]
    anew = f"remove {folder.parent} to start anew"
    try:
        state = _read_state(newest, in_shards)
    except InputError as error:
        if fallback in (None, newest.name):
            way_out = (
                f"give --resume-from {names[-2]} to go on from the checkpoint before it"
                if len(names) > 1
                else f"there is none before it: {anew}"
            )
            raise InputError(f"{error}; {way_out}") from error
        logger.warning("%s; going on from %s", error, fallback)
    else:
        if fallback not in (None, newest.name):
            logger.warning("%s is whole: going on from it, not from %s", newest, fallback)
        return state
    try:
        return _read_state(folder / fallback, in_shards)
    except InputError as error:
        raise InputError(f"{error}; {newest.name} is damaged, too: {anew}") from error


def newest_sources(output_dir: Path) -> Mapping[str, str] | None:
    """What the newest state that can be read was trained on; None if there is none."""
    for state in reversed(_states(output_dir / "state")):
        with contextlib.suppress(InputError):  # `load_state` will complain
            sources: dict[str, str] = _read_manifest(state)["sources"]
            return sources
    return None


def check_sources(
    output_dir: Path, saved: Mapping[str, str] | None, given: Mapping[str, str]
) -> None:
    """A run must not change over to other data in its course.

    Raises:
        InputError: it would; the message names what has changed.
    """
    if saved is None:
        return
    for name, content_hash in given.items():
        if saved.get(name) != content_hash:
            raise InputError(
                f"run_dir: {output_dir} was trained with other {name}; bring them back to go on "
                "with it, or give another run-dir"
            )


def _states(folder: Path) -> list[Path]:
    """Old to new; what else somebody has put there is left alone."""
    states = [path for path in folder.glob("step_*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(states, key=lambda path: int(path.name.removeprefix("step_")))


def _read_state(folder: Path, in_shards: bool) -> TrainingState:
    manifest = _read_manifest(folder)
    check_files(folder / "state.json", manifest)
    number = manifest.get("format", 1)
    tensors: Mapping[str, Tensors]
    if number == SHARDED_FORMAT:
        from pipelines.run.shards import describe_shards, read_whole  # takes a second

        tensors = describe_shards(folder) if in_shards else read_whole(folder)
    else:
        tensors = {
            name.removesuffix(".safetensors"): load_safetensors(folder / name)
            for name in manifest["files"]
        }
    return TrainingState(
        manifest["step"],
        tensors,
        manifest["sources"],
        manifest.get("metrics", ""),
        number,
        folder if in_shards and number == SHARDED_FORMAT else None,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    manifest = read_manifest(path)
    if manifest.get("format", 1) > SHARDED_FORMAT:
        raise InputError(
            f"{path} was written by a later version: format must be at most {SHARDED_FORMAT}, "
            f"got {manifest['format']}"
        )
    if folder.name != _name(manifest["step"]):
        raise InputError(f"{path} is damaged: it is of step {manifest['step']}")
    return manifest
