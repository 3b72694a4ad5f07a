"""Strict configs, and what pydantic says of wrong ones on one line."""

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tokenizer.storage.untrusted import shortened


class StrictConfig(BaseModel):
    """An immutable set of parameters that rejects unknown keys and wrong types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _check_path(cls, value: object) -> object:
        if isinstance(value, Path) and "\0" in str(value):
            raise ValueError("must not hold a NUL character")
        return value


UNION_MEMBER = re.compile(r"[\[(]|^constrained-|^(int|float|str|bool|none|path)$")


WRONG_KIND = {"tuple_type", "int_type", "float_type", "none_required", "literal_error"}


MOST_COMPLAINTS = 5


def describe_validation_error(error: ValidationError) -> str:
    """The complaints of pydantic on one line, each led by its field; the first few of many."""
    complaints: dict[str, str] = {}
    entries = error.errors(include_url=False)
    for entry in sorted(entries, key=lambda own: own["type"] in WRONG_KIND):
        length = len(entry["loc"])
        if entry["type"] == "too_short" and any(
            own["loc"][:length] == entry["loc"] != own["loc"] for own in entries
        ):
            continue  # a wrong member, of which pydantic complains, too, is not counted
        # pydantic adds the members of a union to the path of a field.
        path = [str(part) for part in entry["loc"] if not UNION_MEMBER.search(str(part))]
        message = shortened(entry["msg"].removeprefix("Value error, "))  # pydantic's, of our own
        field = shortened(".".join(path))
        is_told = entry["type"] in {"missing", "value_error"}
        given = "" if is_told else f", got {shortened(repr(entry['input']))}"
        # Of a union, the member that was meant: the one whose type is right.
        complaints.setdefault(field, f"{field}: {message}{given}".removeprefix(": "))
    told = list(complaints.values())[:MOST_COMPLAINTS]
    if len(complaints) > len(told):
        told.append(f"and {len(complaints) - len(told)} more")
    return "; ".join(told)
