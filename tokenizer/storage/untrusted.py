"""Weights that a stranger may have written: checked before memory is taken."""

from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

MAX_HEADER_BYTES = 2**22
"""Length of a safetensors header; tens of thousands of tensors are listed in less."""
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


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        InputError: the file is absent or damaged.
    """
    read_header(path)  # refuses what is damaged
    return safetensors.torch.load_file(path)
