"""Reading what a stranger may have written: bounded before memory is taken, and never executed."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenizer.storage.errors import InputError

MAX_JSON_BYTES = 2**18
"""Length of a JSON file; a run's config has a few thousand."""
MAX_HEADER_BYTES = 2**22
"""Length of a safetensors header; tens of thousands of tensors are listed in less."""
MAX_NESTING = 32
MAX_DIMENSIONS = 8
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
    """What a safetensors file holds: https://huggingface.co/docs/safetensors.

    Checked here and not left to the library alone, so that no size that the file claims is
    allocated: the tensors must cover the rest of the file exactly.

    Raises:
        InputError: the file is absent, damaged or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    problem = f"{path} is damaged or not a safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{problem}: it has {size} bytes and names a header of {length}")
        header = parse_json(file.read(length), f"{problem}: its header")
    if not isinstance(header, dict):
        raise InputError(f"{problem}: its header is no object")
    header.pop("__metadata__", None)
    stored, spans = {}, []
    for name, entry in header.items():
        tensor, span = _stored_tensor(entry, f"{problem}: {shortened(repr(name))}")
        stored[name] = tensor
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise InputError(f"{problem}: its tensors overlap or leave a gap at byte {first}")
        end = last
    if end != size - 8 - length:
        raise InputError(f"{problem}: its tensors have {end} bytes, it has {size - 8 - length}")
    return stored


def _stored_tensor(entry: Any, problem: str) -> tuple[StoredTensor, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{problem} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{problem} has an unknown dtype {shortened(repr(dtype))}")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > MAX_DIMENSIONS
            or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            raise InputError(
                f"{problem}: {name} must be up to {MAX_DIMENSIONS} whole numbers, "
                f"got {shortened(repr(numbers))}"
            )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise InputError(f"{problem} has {num_bytes} bytes by its shape, got offsets {offsets}")
    return StoredTensor(DTYPES[dtype], tuple(shape)), (offsets[0], offsets[1])


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
