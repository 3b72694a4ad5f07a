"""What images are compared with: real ones and their floor, or saved statistics."""

import hashlib
import pickle
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int64

from pipelines.data.cache import delete_and_start_again, open_array, open_entry, write_entry
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.feature_shares import identity_key
from pipelines.evaluation.streaming import Statistics
from pipelines.processes import sum_over_processes
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, naming

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


def cached_statistics(
    cache_dir: Path,
    identity: Mapping[str, Any],
    compute: Callable[[], Statistics],
    accelerator: Accelerator,
) -> Statistics:
    """Statistics of the features of real images, computed once and kept in `cache_dir`.

    Args:
        cache_dir: reached by all processes; `check_data --verify` reads what lies there.
        identity: JSON values, of all that the statistics depend on.
        compute: called by all processes together, if the cache does not have them.
        accelerator: the processes.

    Raises:
        InputError: the entry is damaged.
    """
    folder = cache_dir / f"statistics-{identity_key(identity)}"
    is_there = torch.tensor([int(accelerator.is_main_process and folder.exists())])
    if not sum_over_processes(accelerator, is_there).item():
        computed = compute()
        if accelerator.is_main_process:
            _store(folder, computed)
        accelerator.wait_for_everyone()
    with delete_and_start_again(folder):
        dim = open_entry(folder)["dim"]
        shapes = {"mean": (dim,), "covariance": (dim, dim)}
        arrays = (open_array(folder / f"{n}.npy", np.float64, shapes[n]) for n in shapes)
        return Statistics(*map(np.array, arrays))


def _store(folder: Path, statistics: Statistics) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp{uuid.uuid4().hex[:12]}")
    temporary.mkdir(parents=True)
    try:
        with naming(folder):
            for name, array in statistics._asdict().items():
                np.save(temporary / f"{name}.npy", array)
            write_entry(temporary, {"dim": len(statistics.mean)})
        if not folder.exists():  # another evaluation may have been faster
            temporary.rename(folder)
        flush_to_disk(folder.parent)
    finally:
        rmtree(temporary, ignore_errors=True)
