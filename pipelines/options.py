"""Command lines: presets and saved files, options over them, help, one-line errors."""

import contextlib
import difflib
import io
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipelines.presets import COSTS_NOTE, describe_preset
from pipelines.run.folder import RunConfigT, load_run
from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

ConfigT = TypeVar("ConfigT", bound=StrictConfig)

HELP = {"-h", "--help"}
HELP_ALL = "--help-all"


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
    program = program_name(command)
    if not given or given[0] in HELP:
        width = max(map(len, presets))
        names = "\n".join(f"  {name:{width}}  {describe_preset(name)}" for name in presets)
        print(
            f"usage: {program} PRESET [--option value ...]\n\n{summary}\n\n"
            f"PRESET, or the path of a saved config.json:\n{names}\n\n{COSTS_NOTE}\n\n"
            f"Options of a preset with its values: {program} PRESET --help"
        )
        raise SystemExit(0 if given else 2)
    name, *overrides = given
    if name in presets:
        base = presets[name]
    elif name.endswith(".json"):
        base = load_run(config_class, Path(name))
    else:
        known = f"give one of {', '.join(presets)}, or a .json file"
        raise InputError(f"unknown preset {name!r}: {did_you_mean(name, presets) or known}")
    return parse_options(config_class, f"{command} {name}", overrides, base)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A question that names the nearest of the names; empty if none is near."""
    close = difflib.get_close_matches(word, list(names), 1)
    return f"did you mean {close[0]!r}?" if close else ""


def program_name(command: str) -> str:
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

    --help shows the class's `main_options`, --help-all every option.

    Raises:
        InputError: an option is unknown, missing or out of range.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    asks_for_help = not HELP.isdisjoint(given)
    if asks_for_help and config_class.main_options:
        print(_short_help(config_class, program_name(command), default))
        raise SystemExit(0)
    if HELP_ALL in given:
        asks_for_help, given = True, ["--help"]
    output = io.StringIO()  # tyro draws a box where one line is wanted
    with contextlib.ExitStack() as stack:
        if not asks_for_help:
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
        try:
            config: ConfigT = tyro.cli(
                config_class,
                prog=program_name(command),
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
    message = " ".join(" ".join(parts[1] if len(parts) > 1 else parts[0]).split())
    unread = re.match(r"(?:Error parsing |invalid choice .* ')--([^\s:']+)", message)
    for name, field, _ in _options(default or config_class):
        if unread is not None and name == unread[1]:
            values = " ".join(_values(given).get(name.replace("-", "_"), []))
            wanted = _describe_type(field.annotation)
            return f"{name.replace('-', '_')} must be {wanted}, got {shortened(repr(values))}"
    unknown = re.match(r"Unrecognized options: (--[^\s,=]+)", message)
    names = [f"--{name}" for name, *_ in _options(default or config_class)]
    meant = did_you_mean(unknown[1], names) if unknown else ""
    return f"{message}; {meant}" if meant else message


def _options(config: object, path: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """The options of a config or its class: name, field and default."""
    config_class = config if isinstance(config, type) else type(config)
    assert issubclass(config_class, StrictConfig)
    for name, field in config_class.model_fields.items():
        value = field.default if isinstance(config, type) else getattr(config, name)
        words = path + name.replace("_", "-")
        members = value if isinstance(value, tuple) else (value,)
        if members and all(isinstance(member, StrictConfig) for member in members):
            for number, member in enumerate(members):
                place = f"{number}." if isinstance(value, tuple) else ""
                yield from _options(member, f"{words}.{place}")
        else:
            yield words, field, value


def _short_help(
    config_class: type[StrictConfig], program: str, default: StrictConfig | None
) -> str:
    """Usage, purpose and the options that matter most, each with its value."""
    options = {name.replace("-", "_"): entry for name, *entry in _options(default or config_class)}
    usage, lines = [program], []
    for name in config_class.main_options:
        field, value = options[name]
        word = f"--{name.replace('_', '-')}"
        for metadata in field.metadata:
            if getattr(metadata, "metavar", None):  # where it is given by its place
                word = str(metadata.metavar)
                usage.append(f"[{word}]" if value is None else word)
        shown = "required" if field.is_required() and default is None else _shown(value)
        text = f"{' '.join((field.description or '').split())} ({shown})"
        first = f"  {word}\n{' ' * 30}" if len(word) > 26 else f"  {word:28}"
        lines.append(first + textwrap.fill(text, 70).replace("\n", "\n" + " " * 30))
    purpose = (config_class.__doc__ or "").split("\n\n")[0]
    rest = f"\n\nAll {len(options)} options: {program} {HELP_ALL}"
    return (
        f"usage: {' '.join(usage)} [--option value ...]\n\n{' '.join(purpose.split())}\n\n"
        + "\n".join(lines)
        + (rest if len(options) > len(lines) else "")
    )


def _shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)


def _section(
    config_class: type[StrictConfig],
    default: StrictConfig | None,
    class_name: str,
    complaint: str,
    given: Sequence[str],
) -> str:
    """Which of the places of such a class pydantic means: where that field has that value."""
    options = _values(given)
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


def _values(given: Sequence[str]) -> dict[str, list[str]]:
    """What follows each option of a command line, up to the next one."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in given:
        if word.startswith("--"):
            name, *value = word.removeprefix("--").split("=", 1)
            values = options.setdefault(name.replace("-", "_"), [])
            values += value
        else:
            values.append(word)
    return options


_KINDS = {int: "whole number", float: "number", str: "text", Path: "path"}


def _describe_type(kind: Any) -> str:
    """What may be given for a field of this type: "a whole number or None", say."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _describe_type(arguments[0])
    if get_origin(kind) in {Union, UnionType}:
        if any("none" in get_args(member) for member in arguments):  # None would be read twice
            arguments = tuple(member for member in arguments if member is not NoneType)
        described = ["several" if ... in get_args(m) else _describe_type(m) for m in arguments]
        return " or ".join(sorted(dict.fromkeys(described), key="None".__eq__))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(kind) is tuple:
        kinds = [member for member in arguments if member is not ...]
        count = "" if ... in arguments else f"{len(kinds)} "
        return count + _describe_type(kinds[0]).removeprefix("a ") + "s"
    return "None" if kind in {None, NoneType} else f"a {_KINDS.get(kind, kind)}"


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


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
