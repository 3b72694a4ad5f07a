"""The record of a run: `metrics.jsonl`, one object a line, and TensorBoard beside it."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from tokenizer.storage.errors import InputError
from tokenizer.storage.files import naming, replace_file

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | list[float]]


class RunLog:
    """Writes metrics on the main process; metrics.jsonl has no step twice, also after a resume.

    TensorBoard keeps what an interrupted run had shown, and shows the later value.

    Args:
        folder: of the stage.
        accelerator: its trackers are started.
        first_step: to go on from; later lines will be written again.
        content_hash: of the lines up to there, as `flush` gave it; others are warned about.

    Raises:
        InputError: a line of metrics.jsonl is damaged.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, first_step: int, content_hash: str = ""
    ) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._file = None
        self._hash = hashlib.sha256()
        if accelerator.is_main_process:
            path = folder / "metrics.jsonl"
            kept = b"".join(_lines_until(path, first_step) if path.exists() else [])
            self._hash.update(kept)
            if content_hash not in ("", self._hash.hexdigest()):
                logger.warning(
                    "%s: lines up to step %d are missing or changed; the weights are not affected",
                    path,
                    first_step,
                )
            replace_file(path, lambda temporary: temporary.write_bytes(kept))
            self._file = path.open("ab")
        accelerator.init_trackers("tensorboard")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with naming(self._folder / "metrics.jsonl"):
                self._file.close()
        # Not `end_training`, which would part the processes before the next stage.
        with naming(self._folder / "tensorboard"):
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def flush(self) -> str:
        """Waits until all lines are on the disk: a checkpoint must not be ahead of them.

        Returns:
            Their hash on the main process, nothing on others.
        """
        if self._file is None:
            return ""
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def write(self, step: int, phase: str, metrics: Metrics) -> None:
        """One line: `step` counts finished optimizer steps, `phase` is train or validation."""
        if self._file is None:
            return
        line = json.dumps({"step": step, "phase": phase, **metrics}).encode() + b"\n"
        with naming(self._folder / "metrics.jsonl"):
            self._file.write(line)
            self._file.flush()
        self._hash.update(line)
        flat: dict[str, float] = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                # As people count. Earlier versions counted from 0: a run that goes on mixes none.
                flat |= {
                    f"{phase}/{name}/layer_{n}_of_{len(value)}": entry
                    for n, entry in enumerate(value, 1)
                }
            elif math.isfinite(value):
                flat[f"{phase}/{name}"] = value
        with naming(self._folder / "tensorboard"):
            self._accelerator.log(flat, step=step)


def _lines_until(path: Path, last_step: int) -> list[bytes]:
    """What was written up to a step; later lines will be written again."""
    kept = []
    *lines, _ = path.read_bytes().split(b"\n")  # the rest was cut off in the midst of writing
    for number, line in enumerate(lines, 1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is damaged: repair or remove it to go on"
            ) from error
        if step <= last_step:
            kept.append(line + b"\n")
    return kept


def read_metrics(folder: Path, phase: str) -> dict[str, list[list[Any]]]:
    """Curves of a run: for each metric of a phase, [steps, values]; lists stay lists."""
    curves: dict[str, list[list[Any]]] = {}
    *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")  # the rest is being written
    for line in lines:
        entry = json.loads(line)
        if entry.pop("phase") != phase:
            continue
        step = entry.pop("step")
        for name, value in entry.items():
            steps, values = curves.setdefault(name, [[], []])
            steps.append(step)
            values.append(value)
    return curves
