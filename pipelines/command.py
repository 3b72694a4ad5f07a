"""What all commands share: presets and saved files, overrides, one-line errors."""

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro
from accelerate import PartialState
from pydantic import ValidationError

from pipelines.processes import is_lost_partner
from pipelines.run.folder import RunConfigT, load_run
from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.errors import InputError

ConfigT = TypeVar("ConfigT", bound=StrictConfig)

TRAINING_MEMORY = (
    "raise training.gradient-accumulation-steps, which may differ when a run goes on, or lower "
    "training.batch-size in a new run-dir"
)
"""What saves memory in both stages: all work beside the steps is cut by the same numbers."""

MAKE_ROOM = "make room there and run the same command again"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# There is no class for these: torch's CPU allocator, C++, CUDA's libraries, the system, oneDNN.
_NO_MEMORY = re.compile(
    r"out of memory|can(no|')t (allocate memory|start new thread)|bad_alloc|ALLOC_FAILED|"
    r"not create a primitive$",
    re.IGNORECASE,
)


def parse_run(
    presets: Mapping[str, RunConfigT], command: str, arguments: Sequence[str] | None = None
) -> RunConfigT:
    """Reads `PRESET --section.option value ...`; PRESET may be the path of a saved config.json.

    Args:
        presets: configurations by name.
        command: module name, for the help text.
        arguments: the command line without the program; `sys.argv[1:]` if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    config_class = type(next(iter(presets.values())))
    summary = (config_class.__doc__ or "").splitlines()[0]
    program = _program(command)
    names = "\n".join(f"  {name}" for name in presets)
    if not given or given[0] in {"-h", "--help"}:
        print(
            f"usage: {program} PRESET [--option value ...]\n\n{summary}\n\n"
            f"PRESET, or the path of a saved config.json:\n{names}\n\n"
            f"All options of a preset with its values: {program} PRESET --help"
        )
        raise SystemExit(0 if given else 2)
    name, *overrides = given
    if name in presets:
        base = presets[name]
    elif name.endswith(".json"):
        base = load_run(config_class, Path(name))
    else:
        raise InputError(
            f"unknown preset {name!r}: give one of {', '.join(presets)}, or a .json file"
        )
    return parse_options(config_class, f"{command} {name}", overrides, base)


def _program(command: str) -> str:
    """How the user called the command: sub-command of `hqvae`, or module."""
    _, *preset = command.split(" ", 1)
    is_console = sys.argv[0].startswith("hqvae ")
    return " ".join([sys.argv[0], *preset]) if is_console else f"python -m {command}"


def parse_options(
    config_class: type[ConfigT],
    command: str,
    arguments: Sequence[str] | None = None,
    default: ConfigT | None = None,
) -> ConfigT:
    """Reads options into a config, over `default` if there is one.

    Raises:
        InputError: an option is unknown, missing or out of range.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    output = io.StringIO()  # tyro draws a box where one line is wanted
    with contextlib.ExitStack() as stack:
        if not {"-h", "--help"} & set(given):
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
        try:
            config: ConfigT = tyro.cli(
                config_class,
                prog=_program(command),
                description=config_class.__doc__,
                args=given,
                config=(tyro.conf.AvoidSubcommands,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
        except SystemExit as stop:
            if not stop.code:
                raise
            raise InputError(
                _complaint(stop, output.getvalue(), given, config_class, default)
            ) from stop
    return config


def _complaint(
    stop: SystemExit,
    box: str,
    given: Sequence[str],
    config_class: type[StrictConfig],
    default: StrictConfig | None,
) -> str:
    """What pydantic said, if that was why tyro stopped; otherwise the message in tyro's box."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValidationError):
            # tyro builds one section after the other, so pydantic knows only the field.
            complaint = describe_validation_error(cause)
            section = _section(config_class, default, cause.title, complaint, given)
            return section + complaint.replace("; ", f"; {section}")
        cause = cause.__context__
    parts: list[list[str]] = [[]]  # title, message, hints
    for line in box.splitlines():
        if set(line.strip()) == {"-"}:
            parts.append([])
        else:
            parts[-1].append(line)
    message = parts[1] if len(parts) > 1 else parts[0]
    return " ".join(" ".join(message).split())


def _section(
    config_class: type[StrictConfig],
    default: StrictConfig | None,
    class_name: str,
    complaint: str,
    given: Sequence[str],
) -> str:
    """Which of the places of such a class pydantic means: where that field has that value."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in given:
        if word.startswith("--"):
            name, *value = word.removeprefix("--").split("=", 1)
            values = options.setdefault(name.replace("-", "_"), [])
            values += value
        else:
            values.append(word)
    field = complaint.split(" ")[0].split(".")[0].rstrip(":")
    got = complaint.rpartition("got ")[2]

    def fit(section: str) -> tuple[bool, bool, bool]:
        name = section + field
        return (
            any(word in got for word in options.get(name, [])),
            name in options,
            any(option.startswith(section) for option in options),
        )

    return max(_places(default or config_class, class_name), key=fit, default="")


def _places(config: object, class_name: str, path: str = "") -> Iterator[str]:
    """Where a config or its class holds one of this name: "tokenizer.groups.0.", say."""
    members: dict[str, Any] = {}
    if isinstance(config, tuple):
        members = {str(number): member for number, member in enumerate(config)}
    elif isinstance(config, StrictConfig):
        members = {name: getattr(config, name) for name in type(config).model_fields}
        if path and type(config).__name__ == class_name:
            yield path
    elif isinstance(config, type) and issubclass(config, StrictConfig):
        members = {name: field.default for name, field in config.model_fields.items()}
    for name, member in members.items():
        yield from _places(member, class_name, f"{path}{name}.")


def run_command(
    main: Callable[[], None], saves_memory: str = "use a machine with more of it"
) -> NoReturn:
    """Runs a command; an expected error becomes one line on stderr and exit status 2.

    A traceback means a bug. SIGTERM stops a command as Ctrl-C does. `saves_memory` says what to
    change where memory runs out.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("torch", "accelerate", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.suppress(BrokenPipeError), _sigterm_like_ctrl_c(), _no_disk_errors_of_threads():
        try:
            with _lack_of_memory(saves_memory):
                main()
        except ValidationError as error:
            fail(describe_validation_error(error))
        except (InputError, ArithmeticError) as error:
            fail(str(error))
        except OSError as error:
            name = error.filename2 or error.filename  # of a renaming, where it should have led
            named = f"{name}: " if name else ""
            way_on = f"; {MAKE_ROOM}" if error.errno in _NO_SPACE else ""
            fail(f"{named}{error.strerror or error}{way_on}")
        except RuntimeError as error:
            if not is_lost_partner(error):
                raise
            fail(
                "another process of this run has ended, or is silent; its own message says why; "
                "run the same command to go on"
            )
        except KeyboardInterrupt as error:
            if os.environ.get("RANK", "0") == "0":
                print(str(error) or "stopped; run the same command again", file=sys.stderr)
            raise SystemExit(130) from None
        PartialState().destroy_process_group()
    raise SystemExit(0)


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _lack_of_memory(advice: str) -> Iterator[None]:
    """Turns the many errors that mean it into one; what is on disk is whole, as after a kill."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error)
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and not _NO_MEMORY.search(text):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", text, re.I)
        reason = asked.group().replace("Tried", "tried") if asked else text.split("\n")[0]
        reason = f" ({reason})" if reason else ""
        raise InputError(f"out of memory{reason}: {advice}") from error


@contextlib.contextmanager
def _no_disk_errors_of_threads() -> Iterator[None]:
    """TensorBoard raises what fails in its thread once more in the main one."""
    previous = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            previous(failed)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = previous


def announce(message: str) -> None:
    """A line for the user, from the main process."""
    if PartialState().is_main_process:
        print(message)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
