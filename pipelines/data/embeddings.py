"""Vectors or tokens per image from a file: conditions.safetensors or conditions.npy.

An .npy file holds (N, D) or (N, T, D) in floating point; a .safetensors file the same as
`embeddings` and, if not all tokens are there, `mask` (N, T), boolean. A text file beside it, of the
same name with .txt, holds the path below the folder of each row's image, one a line. Without it the
rows belong to the images that are used, sorted by path as Python sorts texts.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipelines.data.folder_scan import printable
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened
from tokenizer.storage.untrusted import read_header

_ROWS_AT_A_TIME = 4096


def open_embeddings(path: Path) -> tuple[Tensor, Tensor | None]:
    """Embeddings (N, D) or (N, T, D) on the disk, and the mask (N, T) of tokens.

    Raises:
        InputError: it is no such file, or a number in it is not finite.
    """
    mask = None
    if path.suffix == ".npy":
        try:
            # Changes would stay in memory: torch has no arrays that are read-only.
            embeddings = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except Exception as error:  # numpy evaluates the header, which fails in many ways
            raise InputError(
                f"{printable(path)} is damaged or no .npy file of numbers: {shortened(str(error))}"
            ) from error
    else:
        names = read_header(path).keys()
        if not names >= {"embeddings"} or not names <= {"embeddings", "mask"}:
            raise InputError(
                f"{printable(path)} must hold embeddings, and mask if need be, got "
                f"{shortened(', '.join(sorted(names)))}"
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                embeddings = file.get_tensor("embeddings")
                mask = file.get_tensor("mask") if "mask" in names else None
        except SafetensorError as error:
            raise InputError(f"{printable(path)} is damaged: {shortened(str(error))}") from error
    shape = tuple(embeddings.shape)
    if len(shape) not in (2, 3) or 0 in shape or not embeddings.is_floating_point():
        raise InputError(
            f"{printable(path)} must hold (N, D) or (N, T, D) in floating point, got "
            f"{embeddings.dtype} {shape}"
        )
    if mask is not None and (tuple(mask.shape) != shape[:-1] or mask.dtype != torch.bool):
        raise InputError(
            f"{printable(path)} must hold a boolean mask {shape[:-1]}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if mask is not None and len(shape) == 2:
        raise InputError(f"{printable(path)} must hold no mask beside vectors (N, D)")
    for start in range(0, len(embeddings), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        is_usable = embeddings[rows].isfinite()
        if mask is not None:
            is_usable |= ~mask[rows].unsqueeze(2)
        if not bool(is_usable.all()):
            row = start + int((~is_usable.flatten(1).all(1)).nonzero()[0, 0])
            raise InputError(f"{printable(path)} must be finite, got NaN or infinity in row {row}")
    return embeddings, mask


def names_file(path: Path) -> Path:
    """Where the images of the rows are named."""
    return path.with_suffix(".txt")


def rows_by_name(path: Path, num_rows: int, names: Sequence[str]) -> dict[str, int]:
    """Row of each image in the file at `path`.

    Args:
        path: of the embeddings.
        num_rows: how many there are.
        names: of all images that are used.

    Raises:
        InputError: there are more or fewer rows, or an image has none.
    """
    listing = names_file(path)
    if not listing.exists():
        if num_rows != len(names):
            raise InputError(
                f"{printable(path)} must have a row for each of the {len(names)} images that are "
                f"used, sorted by path, got {num_rows}; {listing.name} may name their images"
            )
        return {name: row for row, name in enumerate(sorted(names))}
    try:
        listed = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(listing)} cannot be read: {error}") from error
    if len(listed) != num_rows:
        raise InputError(
            f"{printable(listing)} must name {num_rows} images, a line for each row of "
            f"{path.name}, got {len(listed)}"
        )
    rows = {name: row for row, name in enumerate(listed)}
    if len(rows) < len(listed):
        twice = next(name for row, name in enumerate(listed) if rows[name] != row)
        raise InputError(f"{printable(listing)} names {printable(twice)} twice")
    missing = [name for name in names if name not in rows]
    if missing:
        raise InputError(
            f"{printable(listing)} must name each image, got no line for {len(missing)} of "
            f"{len(names)}, the first is {printable(missing[0])}"
        )
    return rows


def files_hash(path: Path) -> str:
    """SHA-256 of a file, and of the one beside it that names its images."""
    listing = [names_file(path)] if path.name.endswith((".npy", ".safetensors")) else []
    digest = hashlib.sha256()
    for own in [path, *(own for own in listing if own.is_file())]:
        with own.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
