"""Strict configs, their saved format, and what pydantic says of wrong ones on one line."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

FORMAT = 3
"""Number under "format" in each config.json; version 0.1 wrote none, which is read as 1. Until 2
rotary positions of a prior stood alone."""


def check_path(path: Path) -> Path:
    """Refuses what no file system takes, and an empty path, such as of a shell's unset variable.

    Raises:
        ValueError: for pydantic.
    """
    if "\0" in str(path):
        raise ValueError("must not hold a NUL character")
    if path == Path():
        whole = "the present folder needs its whole path"
        raise ValueError(f"must be a path, got '' or '.' ({whole})")
    return path


class StrictConfig(BaseModel):
    """An immutable set of parameters that rejects unknown keys and wrong types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    main_options: ClassVar[tuple[str, ...]] = ()
    """Of a command: those that its short help shows, by their path such as training.seed."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """Of a command: those that name a run, a folder or a file that must be there."""

    @field_validator("*")
    @classmethod
    def _check_paths(cls, value: object) -> object:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Path):
                check_path(part)
        return value


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def pop_format(fields: dict[str, Any], source: str) -> int:
    """Takes the format number out of what a config.json holds; `source` names it in the error.

    Raises:
        InputError: a later version has written it, or it is no such number.
    """
    version = fields.pop("format", 1)
    if type(version) is not int or version < 1:
        raise InputError(
            f"{source}: format must be a whole number from 1, got {shortened(repr(version))}"
        )
    if version > FORMAT:
        raise InputError(
            f"{source}: format must be at most {FORMAT}, got {shortened(repr(version))}: a later "
            "version has written it"
        )
    return version


def validate_fields(config_class: type[ConfigT], fields: object, source: str) -> ConfigT:
    """The config that JSON values describe.

    Raises:
        InputError: a field is wrong.
    """
    try:
        return config_class.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise InputError(f"{source}: {describe_validation_error(error)}") from error


UNION_MEMBER = re.compile(r"[\[(]|^constrained-|^(int|float|str|bool|none|path)$")


WRONG_KIND = {"tuple_type", "int_type", "float_type", "none_required", "literal_error"}


MOST_COMPLAINTS = 5


def describe_validation_error(error: ValidationError) -> str:
    """The complaints of pydantic on one line, each led by its field; the first few of many."""
    complaints: dict[str, str] = {}
    entries = error.errors(include_url=False)
    for entry in sorted(entries, key=lambda entry: entry["type"] in WRONG_KIND):
        length = len(entry["loc"])
        if entry["type"] == "too_short" and any(
            other["loc"][:length] == entry["loc"] != other["loc"] for other in entries
        ):
            continue  # a wrong member, of which pydantic complains, too, is not counted
        # pydantic adds the members of a union to the path of a field.
        path = [str(part) for part in entry["loc"] if not UNION_MEMBER.search(str(part))]
        message = shortened(entry["msg"].removeprefix("Value error, "))  # pydantic's, of our own
        field = shortened(".".join(path))
        names_value = entry["type"] in {"missing", "value_error"}
        given = "" if names_value else f", got {shortened(repr(entry['input']))}"
        # Of a union, the member that was meant: the one whose type is right.
        complaints.setdefault(field, f"{field}: {message}{given}".removeprefix(": "))
    shown = list(complaints.values())[:MOST_COMPLAINTS]
    if len(complaints) > len(shown):
        shown.append(f"and {len(complaints) - len(shown)} more")
    return "; ".join(shown)
