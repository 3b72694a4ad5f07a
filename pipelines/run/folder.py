"""The folder of a stage belongs to one run: its `config.json` tells which."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipelines.config import RunConfig, TokenizerRunConfig
from tokenizer.storage.configs import FORMAT, pop_format, validate_fields
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json, shortened

logger = logging.getLogger(__name__)

RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


def write_run_config(config: RunConfig) -> None:
    """Writes `config.json` into the run's folder, and removes what a killed run has left there."""
    (config.output_dir / "state").mkdir(parents=True, exist_ok=True)
    for pattern in (".*tmp*", "model/.*tmp*"):  # of `replace_file` and of safetensors
        for abandoned in config.output_dir.glob(pattern):
            abandoned.unlink()
    save_run(config, config.output_dir / "config.json")


def save_run(config: RunConfig, path: Path) -> None:
    """Writes a run configuration, which `load_run` reads, atomically."""
    text = json.dumps({"format": FORMAT, **config.model_dump(mode="json")}, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keeps other commands from training in the folder; the system unlocks it at any end.

    Processes that outlive a killed launcher would otherwise write into it beside the next run.

    Raises:
        InputError: another process is at work there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"run_dir: another process is training in {output_dir}; wait for it, or end it"
            ) from error
        yield


def check_output_dir(config: RunConfigT) -> RunConfigT:
    """Compares the run with the one that `output_dir` holds, if any.

    Returns:
        The run, with the rules for folders by which the one there began.

    Raises:
        InputError: it holds another one, or cannot be written.
    """
    # Not `Path.exists`, which fails in a folder that may not be entered.
    folders = (config.output_dir, *config.output_dir.absolute().parents)
    existing = next(folder for folder in folders if os.path.exists(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run_dir: {existing} cannot be written; make it so, or give another one")
    model, state = config.output_dir / "model", config.output_dir / "state"
    if model.exists() and not state.exists():
        raise InputError(
            f"run_dir: {state} is gone, so that {config.output_dir} cannot go on; "
            f"move {model} away to train it anew, or give another run-dir"
        )
    saved = _run_there(config)
    if saved is None:
        return config
    saved = _allow_other_hardware(_allow_moved_data(saved, config), config)
    if config.extend_to is not None:
        saved, config = _extend(saved, config, config.extend_to)
    config = _keep_folder_rules(saved, config)
    difference = first_difference(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    if difference:
        extended = " and --extend-to" if saved.training.extended_at else ""
        raise InputError(
            f"{config.output_dir} holds another run: {difference}; give the same options{extended} "
            "to resume it, or another run-dir"
        )
    return config


def _run_there(config: RunConfigT) -> RunConfigT | None:
    """The run that `output_dir` holds, if any.

    Raises:
        InputError: it cannot be read, or there is none and it is to be extended.
    """
    path = config.output_dir / "config.json"
    if not path.exists():
        if config.extend_to is not None:
            raise InputError(f"extend_to must be None: {config.output_dir} holds no finished run")
        return None
    try:
        fields = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; remove it to go on with the options that you give") from error
    # A folder may be moved, or named in another way.
    return _saved_run(type(config), fields, path).model_copy(update={"run_dir": config.run_dir})


def check_extension(config: RunConfig) -> None:
    """Checks that the run in `output_dir` can be trained to `config.extend_to`, if that is given.

    Raises:
        InputError: it is not finished, or longer already.
    """
    saved = _run_there(config) if config.extend_to is not None else None
    if saved is not None and config.extend_to is not None:
        _is_longer(saved, config.extend_to)


def check_trained_tokenizer(run_dir: Path) -> None:
    """Checks that a folder is one of a run, or of a saved pipeline.

    Raises:
        InputError: it has no tokenizer, which all that is done with a run needs.
    """
    path = run_dir / "tokenizer" / "config.json"
    if not os.path.isfile(path):
        raise InputError(
            f"run_dir must hold a trained tokenizer: there is no {shortened(str(path))}"
        )


def load_run(config_class: type[RunConfigT], path: Path) -> RunConfigT:
    """Reads a saved run configuration.

    Raises:
        InputError: there is no such file, a later version has written it, or a field is wrong.
    """
    return _saved_run(config_class, read_json(path), path)


def _saved_run(config_class: type[RunConfigT], fields: Any, path: Path) -> RunConfigT:
    if isinstance(fields, dict):  # otherwise pydantic complains
        fields = config_class.upgrade_config(fields, pop_format(fields, str(path)))
    return validate_fields(config_class, fields, str(path))


def _allow_moved_data(saved: RunConfigT, given: RunConfig) -> RunConfigT:
    """Folders may move, workers may be more: hashes tell whether the images are the same."""
    if not isinstance(saved, TokenizerRunConfig) or not isinstance(given, TokenizerRunConfig):
        return saved
    names = ("root", "validation_root", "cache_dir")
    folders = {name: getattr(given.data, name) for name in names}
    same = {name: getattr(given.data.reading, name) for name in ("num_workers", "shard_cache_gb")}
    reading = {"reading": saved.data.reading.model_copy(update=same)}
    return saved.model_copy(update={"data": saved.data.model_copy(update=folders | reading)})


def _allow_other_hardware(saved: RunConfigT, given: RunConfig) -> RunConfigT:
    """A run may go on with less memory: the gradients are the same but for rounding and noise."""
    for name in ("gradient_accumulation_steps", "parallel", "activation_checkpointing"):
        before, after = getattr(saved.training, name), getattr(given.training, name)
        if before != after:
            logger.warning("training.%s is %s from here on, it was %s", name, after, before)
            training = saved.training.model_copy(update={name: after})
            saved = saved.model_copy(update={"training": training})
    return saved


def _extend(saved: RunConfigT, given: RunConfigT, steps: int) -> tuple[RunConfigT, RunConfigT]:
    """The saved run and the given one, both to be trained to so many steps.

    Raises:
        InputError: the run is not finished, or longer already.
    """
    total, extended_at = saved.training.total_steps, saved.training.extended_at
    if _is_longer(saved, steps):
        total, extended_at = steps, (*extended_at, total)
    update = {"total_steps": total, "extended_at": extended_at}
    saved, given = (
        run.model_copy(update={"training": run.training.model_copy(update=update)})
        for run in (saved, given)
    )
    return saved, given


def _is_longer(saved: RunConfig, steps: int) -> bool:
    """Whether the run is to be extended to so many steps; otherwise this is under way already.

    Raises:
        InputError: the run is not finished, or longer already.
    """
    total = saved.training.total_steps
    if steps == total and saved.training.extended_at:
        return False
    if steps <= total:
        raise InputError(f"extend_to must be > {total}, the steps of the run, got {steps}")
    # Only whole checkpoints have such a name.
    if not (saved.output_dir / "state" / f"step_{total:08d}").is_dir():
        raise InputError(
            f"extend_to must be None until the run has done its {total} steps: "
            "the same command without it goes on"
        )
    return True


def _keep_folder_rules(saved: RunConfigT, given: RunConfigT) -> RunConfigT:
    """A run of version 0.1 goes on with the same command, though the default has changed."""
    if not isinstance(saved, TokenizerRunConfig) or not isinstance(given, TokenizerRunConfig):
        return given
    if saved.data.folder_rules == given.data.folder_rules:
        return given
    logger.info("data.folder_rules stays %d, with which the run began", saved.data.folder_rules)
    data = given.data.model_copy(update={"folder_rules": saved.data.folder_rules})
    return given.model_copy(update={"data": data})


def first_difference(saved: Any, given: Any, field: str = "") -> str:
    """In words, the first field in which two JSON values differ; nothing if they do not."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in [*saved, *(key for key in given if key not in saved)]:
            if key not in saved or key not in given:
                return f"{shortened(field + key)} is in one of them only"
            difference = first_difference(saved[key], given[key], f"{field}{key}.")
            if difference:
                return difference
        return ""
    return (
        ""
        if saved == given
        else (f"its {field.rstrip('.')} is {shortened(repr(saved))}, got {given!r}")
    )
