"""JSON that a stranger may have written: bounded before memory is taken, and read strictly."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizer.storage.errors import InputError

MAX_JSON_BYTES = 2**22
"""Length of a JSON file; a run's config has a few thousand, names of classes may have more."""
MAX_NESTING = 32
MOST_SHOWN = 300
"""Characters of a foreign text in a message."""


def shortened(text: str) -> str:
    """Foreign text for a message: printable, on one line, not too long."""
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text)} characters)"


def parse_json(text: bytes, source: str) -> Any:
    """JSON with each key once and finite numbers; `source` names it in the error.

    Raises:
        InputError: it is not JSON, or nested too deep.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise InputError(f"{source} is nested deeper than {MAX_NESTING}") from error
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {shortened(str(error))}") from error
    level = [value]
    for _ in range(MAX_NESTING):
        level = [child for value in level for child in _children(value)]
    if level:
        raise InputError(f"{source} is nested deeper than {MAX_NESTING}")
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: it is absent, too long or not JSON.
    """
    return parse_json(read_bounded(path), str(path))


def read_bounded(path: Path) -> bytes:
    """The bytes of a text file.

    Raises:
        InputError: it is absent or too long.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise InputError(f"{path} must have at most {MAX_JSON_BYTES} bytes, got more")
    return text


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
