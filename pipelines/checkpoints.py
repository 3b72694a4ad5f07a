"""Everything a run needs to go on, in `state/`: weights, moving average, optimizer and step.

Random numbers, data order and rates are functions of the step, so nothing else has to be kept.
Only safetensors and JSON are written and read.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tokenizer.pretrained import InputError, load_safetensors

OptimizerState = dict[int, dict[str, Tensor]]


class TrainingState(NamedTuple):
    """A run between two steps."""

    step: int
    """Number of finished optimizer steps."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    """Moving average of the weights; empty if the run keeps none."""
    optimizer: OptimizerState
    """Tensors of the optimizer by parameter number."""


def save_state(folder: Path, state: TrainingState) -> None:
    """Writes `folder/step_NNNNNNNN`, then removes the older ones.

    The files lie under a temporary name until all are on the disk, so that a run killed at any
    moment finds the new state or the old one.
    """
    target = folder / f"step_{state.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    for abandoned in folder.glob(".step_*.tmp"):
        shutil.rmtree(abandoned)
    temporary.mkdir(parents=True)
    try:
        hashes = {}
        for name, tensors in (
            ("model", state.model),
            ("ema", state.ema),
            ("optimizer", _flatten(state.optimizer)),
        ):
            path = temporary / f"{name}.safetensors"
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(contiguous, path)
            hashes[path.name] = _sha256(path)
        manifest = {"step": state.step, "sha256": hashes}
        (temporary / "state.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for path in temporary.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for older in _states(folder):
        if older != target:
            shutil.rmtree(older)


def load_state(folder: Path) -> TrainingState | None:
    """The newest state, or None before the first.

    Raises:
        InputError: the newest state is damaged.
    """
    states = _states(folder)
    if not states:
        return None
    newest = states[-1]
    try:
        manifest = json.loads((newest / "state.json").read_text())
        step, hashes = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{newest / 'state.json'} is damaged: {error}") from error
    tensors = {}
    for name in ("model", "ema", "optimizer"):
        path = newest / f"{name}.safetensors"
        if not path.is_file() or _sha256(path) != hashes.get(path.name):
            raise InputError(f"{path} is damaged: it does not match state.json")
        tensors[name] = load_safetensors(path)
    return TrainingState(step, tensors["model"], tensors["ema"], _unflatten(tensors["optimizer"]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimizer's tensors by parameter number."""
    state: OptimizerState = optimizer.state_dict()["state"]
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Fills an optimizer that was built alike."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _flatten(state: OptimizerState) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor
        for number, tensors in state.items()
        for name, tensor in tensors.items()
    }


def _unflatten(tensors: dict[str, Tensor]) -> OptimizerState:
    state: OptimizerState = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
