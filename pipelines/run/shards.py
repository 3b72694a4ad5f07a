"""Checkpoints of which each process writes its share, by `torch.distributed.checkpoint`.

Files are safetensors, whose headers say which part of a tensor they hold: what some processes have
saved, others read, whatever their number.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tokenizer.storage.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the name of their network, say, and their own."""

FILE_BYTES = 2**30
"""Of the tensors of one file, whole: a process holds its share of them twice while it writes."""


def staged(parts: Parts) -> Parts:
    """A copy on the CPU of this process's shares."""
    copied = BlockingAsyncStager(type_check=False).stage(_flat(parts))
    return _by_part(copied)


def write_shards(folder: Path, parts: Parts, group: "ProcessGroup") -> None:
    """Writes the shares of this process into `folder`; all processes of the group call it together.

    Raises:
        OSError: one of them could not write; the same on all.
    """
    flat = _flat(parts)
    written, files = 0, {}
    for name, tensor in flat.items():
        files[name] = 1 + written // FILE_BYTES
        written += tensor.numel() * tensor.element_size()
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        save(flat, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from error
        raise


def read_shards(folder: Path, parts: Parts) -> None:
    """Fills tensors, whole ones or shares, with what `folder` holds; all processes together."""
    reader = HuggingFaceStorageReader(str(folder))
    load(_flat(parts), storage_reader=reader)


def read_whole(folder: Path) -> Parts:
    """All tensors, whole, on the CPU of this process.

    Raises:
        InputError: as `describe_shards`.
    """
    parts = {
        part: {name: torch.empty_like(tensor, device="cpu") for name, tensor in named.items()}
        for part, named in describe_shards(folder).items()
    }
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():  # that it is alone, as it is told
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(_flat(parts), storage_reader=reader, no_dist=True)
    return parts


def describe_shards(folder: Path) -> Parts:
    """Names, shapes and types of what the shares make when they are put together; no values.

    Raises:
        InputError: they do not make whole tensors.
    """
    described: dict[str, Tensor] = {}
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, metadata in stored.items():
        assert isinstance(metadata, TensorStorageMetadata)
        covered = sum(math.prod(chunk.sizes) for chunk in metadata.chunks)
        if covered != math.prod(metadata.size):
            raise InputError(
                f"{folder} cannot be shared out anew: of {name} it holds {covered} of "
                f"{math.prod(metadata.size)} values"
            )
        described[name] = torch.empty(metadata.size, dtype=metadata.properties.dtype, device="meta")
    return _by_part(described)


def _flat(parts: Parts) -> dict[str, Tensor]:
    return {f"{part}/{name}": own for part, named in parts.items() for name, own in named.items()}


def _by_part(flat: Mapping[str, Tensor]) -> Parts:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts
