"""Reading what a stranger may have written: bounded before memory is taken, and never executed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors import SafetensorError

from tokenizer.storage.errors import InputError

MAX_JSON_BYTES = 2**22
"""Length of a JSON file; a run's config has a few thousand, names of classes may have more."""
MAX_HEADER_BYTES = 2**22
"""Length of a safetensors header; tens of thousands of tensors are listed in less."""
MAX_NESTING = 32
MOST_SHOWN = 300
"""Characters of a foreign text in a message."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Types by the names that safetensors gives them."""


class StoredTensor(NamedTuple):
    """What a safetensors file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


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
        level = [child for own in level for child in _children(own)]
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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Types and shapes in a safetensors file, of whose tensors nothing is read.

    The library checks that they cover the file exactly. It takes headers of 100 MB, for each byte
    of which it needs a dozen in memory: their bound is checked here.

    Raises:
        InputError: the file is absent, damaged or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    problem = f"{path} is damaged or not a safetensors file"
    with path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{problem}: it names a header of {length} bytes")
    stored = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                dtype = entry.get_dtype()
                if dtype not in DTYPES:
                    raise InputError(f"{problem}: {shortened(repr(name))} is of type {dtype}")
                stored[name] = StoredTensor(DTYPES[dtype], tuple(entry.get_shape()))
    except SafetensorError as error:
        raise InputError(f"{problem}: {shortened(str(error))}") from error
    except MemoryError as error:
        raise InputError(f"{path} is larger than the memory of this process may be") from error
    return stored


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
