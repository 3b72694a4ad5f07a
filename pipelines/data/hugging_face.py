"""Hugging Face data sets: saved folders, parquet files, names of the hub, by Arrow memory maps."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from pipelines.config import DataConfig
from pipelines.data.dataset import Split
from pipelines.data.decoding import VERSION, read_file
from pipelines.data.encoded_images import EncodedImages, describe_decoding
from pipelines.data.folder_listing import number_first
from pipelines.data.folder_scan import printable
from pipelines.data.row_split import split_rows
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

if TYPE_CHECKING:
    from datasets import Dataset

_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_CLASS_TYPES = ("int", "uint", "string", "large_string")
_MOST_CLASSES = 100_000
_NUM_HASHED = 64
"""Images whose content tells one data set from another."""


class TableStore:
    """Encoded images in the rows of a table."""

    def __init__(self, table: "Dataset", column: str, title: str) -> None:
        self.table, self.column, self.title = table, column, title

    def read(self, row: int) -> bytes:
        """The file, from the table or from where it points to."""
        image = self.table[row][self.column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError("there is none")
        content: bytes | None = image["bytes"]
        return read_file(Path(image["path"])) if content is None else content

    def name(self, row: int) -> str:
        """The number of its row."""
        return f"row {row} of {self.title}"


class TableImages(EncodedImages):
    """Images of a table, perhaps with captions."""

    def captions(self) -> list[str]:
        """The caption of each image, from the column that `data.reading` names.

        Raises:
            InputError: no column is named, or it holds something else than texts.
        """
        column = self.config.reading.caption_column
        assert isinstance(self.store, TableStore)
        if column is None:
            raise InputError("data.reading.caption_column must name a column for captions")
        texts = _column(self.store.table, column).to_pylist()
        chosen = texts if self.rows is None else [texts[row] for row in self.rows]
        for text in chosen:
            if not isinstance(text, str):
                raise InputError(
                    f"data.reading.caption_column: {column!r} must hold texts, got "
                    f"{shortened(repr(text))}"
                )
        return chosen


def open_table(config: DataConfig, split: Split) -> EncodedImages:
    """One split of the data set that `config.root` or `config.reading.hub_name` names.

    Of several splits, "train" is for training and the first of "validation", "test" and the like
    for validation; of a single one, some rows are held out.

    Raises:
        InputError: it cannot be had, or lacks a column.
    """
    splits, title = _load(config, config.root, "data.root")
    train = splits.get("train", next(iter(splits.values())))
    rows = None
    names = [name for name in _VALIDATION_NAMES if name in splits and splits[name] is not train]
    table = train
    if config.validation_root is not None:
        if split == "validation":
            others, title = _load(config, config.validation_root, "data.validation_root")
            table = others.get("validation", next(iter(others.values())))
    elif names:
        table = train if split == "train" else splits[names[0]]
    else:
        rows = split_rows(len(train), config, split)
    _check_columns(table, config, title)
    store = TableStore(_images_of(table, config, title), config.reading.image_column, title)
    class_names = _class_names(train, config, title)
    labels = _labels(table, class_names, config, title)
    labels = labels if rows is None else labels[rows]
    conversion = describe_decoding(config)
    identity = [VERSION, conversion, class_names, _content_hash(store, labels, rows)]
    return TableImages(
        store=store,
        rows=rows,
        labels=labels,
        class_names=class_names,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        description=f"{title}, {split} {len(labels)} images; {conversion}",
        config=config,
    )


def _load(config: DataConfig, root: Path | None, field: str) -> tuple[dict[str, "Dataset"], str]:
    """All splits, by name, and how to call them in messages."""
    hub_name = config.reading.hub_name
    if (root is None) == (not hub_name):
        raise InputError(
            "data.root or data.reading.hub_name, one of them, must name the data set where "
            "data.dataset is 'datasets'"
        )
    try:
        import datasets  # takes a second, which other sources need not wait for
    except ImportError as error:
        raise InputError(
            "data.dataset 'datasets' needs a package: pip install hqvae[datasets]"
        ) from error
    datasets.disable_progress_bars()
    cache_dir = str(config.cache_dir / "datasets")
    title = printable(root or hub_name)
    try:
        if root is None:
            found = datasets.load_dataset(
                hub_name,
                cache_dir=cache_dir,
                download_config=datasets.DownloadConfig(cache_dir=cache_dir, max_retries=3),
            )
        elif (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            found = datasets.load_from_disk(str(root))
        elif any(root.rglob("*.parquet")):
            found = datasets.load_dataset("parquet", data_dir=str(root), cache_dir=cache_dir)
        else:
            raise InputError(
                f"{field}: {title} holds neither parquet files nor what save_to_disk writes"
            )
    except InputError:
        raise
    except Exception as error:  # of the hub, the network, Arrow and the file system
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        field = field if root else "data.reading.hub_name"
        raise InputError(f"{field}: {title} cannot be loaded: {reason}") from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    return splits, title


def _check_columns(table: "Dataset", config: DataConfig, title: str) -> None:
    for field in ("image_column", "label_column", "caption_column"):
        column = getattr(config.reading, field)
        if column is not None and column not in table.column_names:
            names = ", ".join(map(printable, table.column_names))
            raise InputError(
                f"data.reading.{field}: {title} has no column {column!r}, there are {names}"
            )
    if not len(table):
        raise InputError(f"data.root: {title} has no rows")


def _images_of(table: "Dataset", config: DataConfig, title: str) -> "Dataset":
    """The table with images as bytes or paths."""
    from datasets import Image

    column = config.reading.image_column
    try:
        return table.cast_column(column, Image(decode=False))
    except Exception as error:  # Arrow's
        raise InputError(
            f"data.reading.image_column: {column!r} of {title} holds no images but "
            f"{shortened(str(table.features[column]))}"
        ) from error


def _column(table: "Dataset", column: str) -> Any:
    """An Arrow array of all rows."""
    return table.select_columns([column]).with_format("arrow")[:][column]


def _class_names(train: "Dataset", config: DataConfig, title: str) -> tuple[str, ...]:
    """Those that the data set names, or all values of the column, numbers as such."""
    column = config.reading.label_column
    if column is None:
        return ()
    feature = train.features[column]
    names = getattr(feature, "names", None)
    values: list[Any] = [feature]
    if names is not None or getattr(feature, "dtype", "").startswith(_CLASS_TYPES):
        values = names or _column(train, column).unique().to_pylist()
    if len(values) > _MOST_CLASSES or not all(isinstance(own, str | int) for own in values):
        raise InputError(
            f"data.reading.label_column: {column!r} of {title} must hold classes, numbers or words "
            f"without gaps, got {shortened(str(values[:5]))}"
        )
    words = map(str, values)
    return tuple(words if names is not None else sorted(words, key=number_first))


def _labels(
    table: "Dataset", class_names: tuple[str, ...], config: DataConfig, title: str
) -> Int64[np.ndarray, " rows"]:
    column = config.reading.label_column
    if column is None:
        return np.broadcast_to(np.int64(0), len(table))
    import pyarrow
    import pyarrow.compute

    values = _column(table, column)
    if getattr(table.features[column], "names", None) is None:
        known = pyarrow.array(class_names)
        values = pyarrow.compute.index_in(values.cast(pyarrow.string()), known)
    labels: np.ndarray = values.fill_null(-1).to_numpy().astype(np.int64)
    if not ((labels >= 0) & (labels < len(class_names))).all():
        raise InputError(
            f"data.reading.label_column: {column!r} of {title} has rows without a class of training"
        )
    return labels


def _content_hash(store: TableStore, labels: np.ndarray, rows: np.ndarray | None) -> str:
    """SHA-256 over the labels and some of the images, evenly spread."""
    digest = hashlib.sha256(np.ascontiguousarray(labels).astype("<i8").tobytes())
    for item in np.linspace(0, len(labels) - 1, _NUM_HASHED).astype(np.int64).tolist():
        try:
            digest.update(store.read(item if rows is None else int(rows[item])))
        except (OSError, ValueError):
            digest.update(b"unreadable")
    return digest.hexdigest()
