"""What images are compared with: real ones and their floor, or saved statistics."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.metrics import Statistics
from tokenizer.storage.errors import InputError

STATISTICS_SUFFIXES = (".npz", ".pt")


class SavedStatistics(NamedTuple):
    """Mean and covariance of features that another program has saved."""

    statistics: Statistics
    description: str
    fingerprint: str
    """SHA-256 of the file."""


Reference = ImageDataset | SavedStatistics


def load_statistics(path: Path) -> SavedStatistics:
    """Reads `mu` and `sigma` of a .npz file (pytorch-fid, clean-fid) or of torch-fidelity's .pt.

    Such a file says neither which network and resize it is of, nor of how many images.

    Raises:
        InputError: there is no such file, or none of this kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        saved = _load(path)
        mean, covariance = (np.asarray(saved[key], np.float64) for key in ("mu", "sigma"))
    except (*_UNREADABLE, OSError) as error:
        raise InputError(f"{path} holds no statistics, arrays mu and sigma") from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise InputError(
            f"{path}: sigma must be square with the length of mu, got {covariance.shape} and "
            f"{mean.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: mu and sigma must be finite")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    description = f"statistics in {path.name}, of a network, resize and number that it does not say"
    return SavedStatistics(Statistics(mean, covariance), description, digest)


_UNREADABLE = (
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def _load(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in ("mu", "sigma")}
    # What torch-fidelity pickles: these build arrays of numbers, and nothing else is executed.
    build = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    numbers = [type(np.dtype(kind)) for kind in (np.float32, np.float64)]
    before_numpy_2 = (build, "numpy.core.multiarray._reconstruct")
    allowed = [build, before_numpy_2, np.ndarray, np.dtype, *numbers]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)


class Floor(NamedTuple):
    """Real images in place of those that are compared with the reference."""

    images: ImageDataset
    items: Int64[np.ndarray, " items"]


def floor_of(
    reference: ImageDataset, other: ImageDataset | None, count: int, seed: int
) -> Floor | None:
    """`count` real images to compare with the first of `chosen_items(len(reference), ...)`.

    They are of the other split or, if that gives more of them, of a part of the reference that is
    disjoint from what they are compared with: as many on both sides, fewer than `count` where
    there are no more. None: not even two.
    """
    num_other = 0 if other is None else min(count, len(other))
    num_disjoint = min(count, len(reference) // 2)
    if max(num_other, num_disjoint) < 2:
        return None
    if other is not None and num_other >= num_disjoint:
        return Floor(other, chosen_items(len(other), num_other, seed))
    return Floor(reference, chosen_items(len(reference), 2 * num_disjoint, seed)[num_disjoint:])
