"""Images in tar shards, here or elsewhere, each found by the index of `index-shards`."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import DataConfig
from pipelines.data.cache import delete_and_start_again, open_array, open_entry
from pipelines.data.dataset import Split
from pipelines.data.decoding import VERSION
from pipelines.data.encoded_images import EncodedImages, describe_decoding
from pipelines.data.folder_scan import printable
from pipelines.data.limits import check_size
from pipelines.data.name_table import NameTable
from pipelines.data.remote import is_remote, read_range
from pipelines.data.row_split import split_rows
from pipelines.data.shard_cache import ShardCache
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 2**17


class ShardStore:
    """Files in shards, by the rows of their index.

    Raises:
        InputError: there is no index, or it is damaged.
    """

    def __init__(self, root: Path, field: str, config: DataConfig) -> None:
        if not (root / "facts.json").is_file():
            raise InputError(
                f"{field}: {printable(root)} is no index of shards, which hqvae index-shards writes"
            )
        with delete_and_start_again(root):
            found = open_entry(root)
            self.count: int = found["num_images"]
            self.names = NameTable(root, self.count)
            self.arrays = {
                path.stem: open_array(path, kind, (self.count,))
                for path in sorted(root.glob("*s.npy"))
                if path.stem not in ("names", "name_ends")
                for kind in (np.int32 if path.stem in ("shards", "labels") else np.int64,)
            }
        self.addresses: list[str] = found["shards"]
        self.shard_sizes: list[int] = found["shard_sizes"]
        self.class_names: tuple[str, ...] = tuple(found["class_names"])
        self.content: str = found["content"]
        gigabytes = config.reading.shard_cache_gb
        is_elsewhere = any(map(is_remote, self.addresses))
        self.cache = (
            ShardCache(config.cache_dir / "shards", gigabytes * 1e9) if is_elsewhere else None
        )

    def read(self, row: int) -> bytes:
        """The file; of a shard from elsewhere, out of the cache as far as that goes."""
        return self._read(row, "offsets", "sizes")

    def caption(self, row: int) -> str:
        """The text beside an image.

        Raises:
            InputError: it was not indexed, or cannot be read.
        """
        if "caption_offsets" not in self.arrays:
            raise InputError("condition.kind text needs an index made with --caption-field")
        try:
            return self._read(row, "caption_offsets", "caption_sizes").decode().strip()
        except (OSError, ValueError) as error:
            raise InputError(f"the caption of {self.name(row)} cannot be read: {error}") from error

    def name(self, row: int) -> str:
        """Shard and name in it."""
        return f"{self.addresses[self.arrays['shards'][row]]}/{self.names[row]}"

    def _read(self, row: int, offsets: str, sizes: str) -> bytes:
        number = int(self.arrays["shards"][row])
        offset, size = int(self.arrays[offsets][row]), int(self.arrays[sizes][row])
        check_size(size)
        address = self.addresses[number]
        path: Path | None = Path(address)
        if is_remote(address):
            assert self.cache is not None
            path = self.cache.path_of(address, self.shard_sizes[number])
        if path is None:
            content = read_range(address, offset, size)
        else:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        if len(content) < size:
            raise ValueError(f"cut short, {len(content):,} of {size:,} bytes")
        return content


class ShardImages(EncodedImages):
    """Images in shards, perhaps with captions."""

    def captions(self) -> list[str]:
        """The text beside each image.

        Raises:
            InputError: as `ShardStore.caption`.
        """
        assert isinstance(self.store, ShardStore)
        return [self.store.caption(self._row(item)) for item in range(len(self))]


def open_shards(config: DataConfig, split: Split) -> EncodedImages:
    """One split of the shards whose index lies in `config.root`.

    Raises:
        InputError: no index, or a shard that is missing or of another size than when indexed.
    """
    if config.root is None:
        raise InputError(
            "data.root must name the folder that index-shards wrote where data.dataset is "
            "'shards', got None"
        )
    train = ShardStore(config.root, "data.root", config)
    store, rows = train, None
    if config.validation_root is None:
        rows = split_rows(train.count, config, split)
    elif split == "validation":
        store = ShardStore(config.validation_root, "data.validation_root", config)
        if store.class_names != train.class_names:
            raise InputError(
                "data.validation_root must have the classes of data.root, got "
                f"{len(store.class_names)} and {len(train.class_names)}"
            )
    rows = _without_lost_shards(store, rows, config)
    labels = _labels(store, rows)
    count = len(labels)
    conversion = describe_decoding(config)
    identity: list[Any] = [VERSION, conversion, store.content]
    if rows is not None:
        identity.append(hashlib.sha256(rows.tobytes()).hexdigest())
    return ShardImages(
        store=store,
        rows=rows,
        labels=labels,
        class_names=store.class_names,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        description=f"{config.root}, {split} {count} of {store.count} images in "
        f"{len(store.addresses)} shards; {conversion}",
        config=config,
    )


def _labels(store: ShardStore, rows: np.ndarray | None) -> np.ndarray:
    """Class indices of the rows; zeros, of which one lies in memory, without classes."""
    count = store.count if rows is None else len(rows)
    stored = store.arrays.pop("labels", None)  # whose pages would stay in memory beside the copy
    if stored is None:
        return np.broadcast_to(np.int64(0), count)
    labels = np.empty(count, np.int64)
    for start in range(0, count, _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        labels[part] = stored[part if rows is None else rows[part]]
    return labels


def _without_lost_shards(
    store: ShardStore, rows: np.ndarray | None, config: DataConfig
) -> np.ndarray | None:
    """Rows of the shards that are here as they were indexed; shards elsewhere show when read."""
    lost = []
    for number, (address, size) in enumerate(zip(store.addresses, store.shard_sizes, strict=True)):
        reason = "" if is_remote(address) else _damage(Path(address), size)
        if reason and not config.skip_unreadable:
            raise InputError(
                f"data.root: the shard {printable(address)} {reason}; run index-shards again, or "
                "set data.skip_unreadable to leave out its images"
            )
        if reason:
            lost.append(number)
            logger.warning("left out the shard %s, which %s", printable(address), reason)
    if not lost:
        return rows
    kept = np.arange(store.count) if rows is None else rows
    kept = kept[~np.isin(store.arrays["shards"][kept], lost)]
    if not len(kept):
        raise InputError("data.root: none of the shards is left")
    count = store.count if rows is None else len(rows)
    logger.warning(
        "left out %d images of %d shards, %d remain", count - len(kept), len(lost), len(kept)
    )
    return kept


def _damage(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"is missing ({error.strerror})"
    return "" if found == size else f"has {found:,} bytes, the index says {size:,}"
