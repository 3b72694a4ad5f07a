"""The codes of a data set, extracted once before stage two and read from a memory map."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.data.cache import delete_and_start_again, open_array, open_entry, write_entry
from pipelines.data.dataset import ImageDataset, image_shape
from pipelines.data.encoded_images import EncodedImages
from pipelines.images import to_float
from pipelines.prefetch import one_ahead
from pipelines.processes import bar_disabled
from tokenizer import Tokenizer
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, naming

_ENTRIES_PER_BLOCK = 250
_MARKS = "finished.npy"
"""A byte for each block, while codes are extracted."""


@dataclasses.dataclass(frozen=True)
class CodeDataset:
    """Code indices of N images; with flips, entry N + i is the mirror image of entry i."""

    indices: list[np.ndarray]
    """(entries, depth, h, w) per group, coarse to fine."""
    latents: list[np.ndarray]
    """(entries, dim, h, w) per group in float16; empty unless they were asked for."""
    labels: np.ndarray
    num_images: int
    is_scattered: bool = False
    """Whether they are learned in the order `BatchOrder.scattered()`."""

    def indices_at(self, entries: np.ndarray) -> list[Tensor]:
        """Indices (B, depth, h, w) in int64 per group."""
        return [torch.from_numpy(array[entries].astype(np.int64)) for array in self.indices]

    def latents_at(self, entries: np.ndarray) -> list[Tensor]:
        """Latents (B, dim, h, w) in float32 per group."""
        return [torch.from_numpy(array[entries].astype(np.float32)) for array in self.latents]

    def labels_at(self, entries: np.ndarray) -> Tensor:
        """Labels (B,) in int64."""
        return torch.from_numpy(self.labels[entries % self.num_images])


def extract_codes(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    folder: Path,
    accelerator: Accelerator,
    *,
    flips: bool,
    keeps_latents: bool,
    batch_size: int = 250,
    search: SearchConfig = NO_SEARCH,
) -> CodeDataset:
    """Encodes `dataset` into `folder/<key>/`, or opens what an earlier run has left there.

    The key is a hash of what decides the tokenizer's codes, of data and options; `batch_size`
    changes memory and speed alone.
    Each process encodes a share, block by block; what is interrupted goes on with the blocks that
    are not finished, with any number of processes. A folder under its final name is complete.

    Raises:
        InputError: what an earlier run has left there is damaged.
    """
    options: dict[str, Any] = {
        "data": dataset.fingerprint,
        "flips": flips,
        "latents": keeps_latents,
    }
    if search.is_on:  # what the decoder draws decides, too
        options["search"] = {**search.model_dump(), "weights": tokenizer.content_hash()}
    keyed: dict[str, dict[str, Any]] = {}
    for identity in tokenizer.identities():  # earlier versions called the tokenizer otherwise
        metadata = {"tokenizer": identity, **options}
        keyed[hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:16]] = metadata
    found_keys = (key for key in keyed if (folder / key / "facts.json").exists())
    key = next(found_keys, next(iter(keyed)))
    metadata, target = keyed[key], folder / key
    num_entries = len(dataset) * (2 if flips else 1)
    arrays = _arrays(tokenizer, dataset, num_entries, keeps_latents)
    if not (target / "facts.json").exists():
        temporary = folder / f".{key}.tmp"
        if accelerator.is_main_process:
            _prepare(temporary, arrays, num_entries)
        accelerator.wait_for_everyone()
        _encode(
            *(tokenizer, dataset, temporary, accelerator),
            *(num_entries, keeps_latents, batch_size, search),
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / _MARKS).unlink()
            with naming(target):
                write_entry(temporary, metadata)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            flush_to_disk(folder)
        accelerator.wait_for_everyone()
    with delete_and_start_again(target):
        found = open_entry(target)
        if {name: found.get(name) for name in metadata} != metadata:
            raise InputError(f"{target} does not hold the codes of this tokenizer and data")
        opened = {name: open_array(target / name, *array) for name, array in arrays.items()}
    indices = [array for name, array in opened.items() if name.startswith("indices")]
    latents = [array for name, array in opened.items() if name.startswith("latents")]
    is_scattered = isinstance(dataset, EncodedImages)
    return CodeDataset(indices, latents, dataset.labels, len(dataset), is_scattered)


def _arrays(
    tokenizer: Tokenizer, dataset: ImageDataset, num_entries: int, keeps_latents: bool
) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Type and shape of each file."""
    _, height, width = image_shape(dataset)
    arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {}
    for number, code_map in enumerate(tokenizer.code_maps(height, width)):
        size = (code_map.height, code_map.width)
        dtype = np.uint16 if max(code_map.codebook_sizes) <= 2**16 else np.int32
        arrays[f"indices_{number}.npy"] = (dtype, (num_entries, code_map.depth, *size))
        if keeps_latents:
            shape = (num_entries, code_map.code_dim, *size)
            arrays[f"latents_{number}.npy"] = (np.float16, shape)
    return arrays


def _encode(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    folder: Path,
    accelerator: Accelerator,
    num_entries: int,
    keeps_latents: bool,
    batch_size: int,
    search: SearchConfig,
) -> None:
    """Encodes a share of the blocks that are not finished, and marks each that is."""
    groups = range(len(tokenizer.config.groups))
    indices = [np.lib.format.open_memmap(folder / f"indices_{n}.npy", "r+") for n in groups]
    latents = [
        np.lib.format.open_memmap(folder / f"latents_{n}.npy", "r+")
        for n in groups
        if keeps_latents
    ]
    marks = np.lib.format.open_memmap(folder / _MARKS, "r+")
    unfinished = np.flatnonzero(marks == 0)
    accelerator.wait_for_everyone()  # all see the same marks
    blocks = unfinished[accelerator.process_index :: accelerator.num_processes].tolist()
    batches = [
        np.arange(start, min(start + batch_size, end, num_entries))
        for block in blocks
        for end in ((block + 1) * _ENTRIES_PER_BLOCK,)
        for start in range(end - _ENTRIES_PER_BLOCK, min(end, num_entries), batch_size)
    ]
    loading = one_ahead(functools.partial(_load, dataset, entries) for entries in batches)
    with contextlib.closing(loading):
        for entries in tqdm(batches, "codes", disable=bar_disabled(accelerator), leave=False):
            images = next(loading).to(accelerator.device)
            encoding = tokenizer.encode_with_latents(images)
            chosen = tokenizer.encode(images, search) if search.is_on else encoding.indices
            for target, own_indices in zip(indices, chosen, strict=True):
                target[entries] = own_indices.cpu().numpy()
            for target, own_latents in zip(latents, encoding.latents, strict=False):
                target[entries] = own_latents.float().cpu().numpy()
            last = int(entries[-1]) + 1
            if last % _ENTRIES_PER_BLOCK == 0 or last == num_entries:
                for target in [*indices, *latents]:
                    target.flush()  # the codes first: what is marked outlasts a power failure
                marks[(last - 1) // _ENTRIES_PER_BLOCK] = 1
                marks.flush()


def _load(dataset: ImageDataset, entries: np.ndarray) -> Tensor:
    images = to_float(dataset.images_at(entries % len(dataset)))
    is_mirrored = torch.from_numpy(entries >= len(dataset)).view(-1, 1, 1, 1)
    return torch.where(is_mirrored, images.flip(-1), images)


def finished_entries(folder: Path) -> np.ndarray:
    """Which codes in `.KEY.tmp` are written already, while others are: its arrays can be read."""
    marks: np.ndarray = np.load(folder / _MARKS, mmap_mode="r")
    num_entries = len(np.load(folder / "indices_0.npy", mmap_mode="r"))
    return np.flatnonzero(np.repeat(marks, _ENTRIES_PER_BLOCK)[:num_entries])


def _prepare(
    folder: Path, arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]], num_entries: int
) -> None:
    """Makes room for the codes, unless an interrupted extraction has left some of them."""
    num_blocks = (-(-num_entries // _ENTRIES_PER_BLOCK),)
    if (folder / _MARKS).exists():  # which is made last
        with contextlib.suppress(InputError):
            for name, (dtype, shape) in arrays.items():
                open_array(folder / name, dtype, shape)
            open_array(folder / _MARKS, np.uint8, num_blocks)
            return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, (dtype, shape) in arrays.items():
        _create(folder / name, dtype, shape)
    _create(folder / _MARKS, np.uint8, num_blocks)


def _create(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):  # on a full disk, a write to a memory map kills the process
        with naming(path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
