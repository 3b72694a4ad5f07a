"""Features of many images as shares on disk: memory stays constant, and finished shares are kept.

A set of images that is measured again, after a kill say, goes on behind its finished shares, with
any number of processes.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines.evaluation.features import FeatureOutput
from pipelines.evaluation.rows import StoredRows
from pipelines.processes import sum_over_processes
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import make_folder, replace_file
from tokenizer.storage.hashes import weights_hash
from tokenizer.storage.untrusted import load_safetensors, read_header

logger = logging.getLogger(__name__)

SHARE_SIZE = 1000
"""Images whose features are written, and computed again after a kill, together."""


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Where an evaluation keeps what it would otherwise compute again."""

    shares: Path | None = None
    """Folder for features, which all processes reach; None: they stay in memory."""
    statistics: Path | None = None
    """Cache of means and covariances of real images; None: they are computed each time."""


IN_MEMORY = FeatureStore()


class StoredFeatures(NamedTuple):
    """What an extractor gives of a whole set, on disk."""

    features: StoredRows
    logits: StoredRows


Features = FeatureOutput | StoredFeatures
"""Of a whole set of images."""


def identity_key(identity: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def stored_features(
    folder: Path,
    identity: Mapping[str, Any],
    count: int,
    extract: Callable[[int, int, str], FeatureOutput],
    accelerator: Accelerator,
    title: str,
) -> StoredFeatures:
    """Features of images 0 to `count`, of which `folder/<key>/` keeps what is finished.

    All processes share the work on each share. On a GPU the network still runs while the next
    images are drawn or read: nothing waits for its output before a share ends.

    Args:
        folder: reached by all processes.
        identity: JSON values, of all that the features depend on.
        count: number of images.
        extract: features of the images from a number on, of so many, under such a title; called by
            all processes together.
        accelerator: the processes.
        title: of the bars.

    Raises:
        InputError: a file is in the place of the folder.
    """
    key = identity_key({**identity, "count": count, "share_size": SHARE_SIZE})
    starts = range(0, count, SHARE_SIZE)
    paths = tuple(folder / key / f"{start:08d}.safetensors" for start in starts)
    is_finished = torch.zeros(count, dtype=torch.int64)
    if accelerator.is_main_process:
        make_folder(folder / key)
        for start, path in zip(starts, paths, strict=True):
            size = min(SHARE_SIZE, count - start)
            is_finished[start] = path.exists() and _is_whole(path, key, size)
    is_finished = sum_over_processes(accelerator, is_finished)  # as the main process sees the disk
    if accelerator.is_main_process and (number := int(is_finished.sum())):
        logger.info("%s: %d of %d shares are finished", folder / key, number, len(paths))
    for start, path in zip(starts, paths, strict=True):
        if is_finished[start]:
            continue
        shown = f"{title}, {start:,} of {count:,}" if start else title
        output = extract(start, min(SHARE_SIZE, count - start), shown)
        if accelerator.is_main_process:
            _write(path, key, output)
    accelerator.wait_for_everyone()
    dims = {name: tensor.shape[1] for name, tensor in read_header(paths[0]).items()}
    return StoredFeatures(
        *(
            StoredRows(paths, name, SHARE_SIZE, (count, dims[name]))
            for name in StoredFeatures._fields
        )
    )


def _write(path: Path, key: str, output: FeatureOutput) -> None:
    tensors = {name: rows.contiguous() for name, rows in output._asdict().items()}
    metadata = {"set": key, "sha256": weights_hash(tensors)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def _is_whole(path: Path, key: str, size: int) -> bool:
    """Whether a share holds so many rows of this set; otherwise says that it is computed anew."""
    try:
        tensors = load_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except InputError as error:
        logger.warning("%s; its %d images are computed anew", error, size)
        return False
    if metadata.get("set") != key:
        problem = "is of another evaluation"
    elif metadata.get("sha256") != weights_hash(tensors):
        problem = "is damaged: it does not match its own hash"
    else:
        return True
    logger.warning("%s %s; its %d images are computed anew", path, problem, size)
    return False
