"""metadata.csv and metadata.jsonl beside images, as Hugging Face's `imagefolder` has them."""

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.condition_inputs import attribute_values
from pipelines.data.folder_scan import printable
from prior import AttributeConditionConfig, AttributeConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

logger = logging.getLogger(__name__)

FILE_NAME = "file_name"
CAPTION_COLUMNS = ("text", "caption")
MOST_VALUES = 4096
"""Of an attribute: a column with more is a text or a number of its own for each image."""

Row = dict[str, Any]


def read_metadata(path: Path, names: Sequence[str]) -> list[Row]:
    """The row of each image, found by its path below the folder in the column `file_name`.

    Raises:
        InputError: the file cannot be read, names an image twice or leaves one out.
    """
    rows: dict[str, Row] = {}
    for place, row in _rows(path):
        name = row.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            raise InputError(f"{place} must give a {FILE_NAME}, got {shortened(repr(name))}")
        name = PurePosixPath(name).as_posix()
        if name in rows:
            raise InputError(f"{place} names {printable(name)} a second time")
        rows[name] = row
    missing = [name for name in names if name not in rows]
    if missing:
        raise InputError(
            f"{printable(path)} must have a row for each image, got none for {len(missing)} of "
            f"{len(names)}, the first is {printable(missing[0])}"
        )
    others = rows.keys() - set(names)
    if others:
        logger.warning(
            "%s: %d rows are not of images that are used here, the first is %s",
            printable(path),
            len(others),
            printable(min(others)),
        )
    return [rows[name] for name in names]


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row after its place in words."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                if FILE_NAME not in (reader.fieldnames or ()):
                    raise InputError(f"{printable(path)} must have a column {FILE_NAME}")
                for row in reader:
                    place = f"{printable(path)}, line {reader.line_num},"
                    if None in row or None in row.values():
                        raise InputError(f"{place} must have {len(reader.fieldnames or ())} cells")
                    yield place, row
            else:
                for number, line in enumerate(file, 1):
                    place = f"{printable(path)}, line {number},"
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise InputError(f"{place} must be a JSON object")
                        yield place, row
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError) as error:
        raise InputError(f"{printable(path)} cannot be read: {shortened(str(error))}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON: {error}") from error


def captions(rows: Sequence[Row], columns: Sequence[str], path: Path) -> list[str]:
    """The caption in each row.

    Raises:
        InputError: there is no such column, or a row has no text in it.
    """
    present = {name for row in rows for name in row}
    found = [name for name in columns or CAPTION_COLUMNS if name in present]
    if len(found) != 1:
        wanted = " or ".join(columns or CAPTION_COLUMNS)
        raise InputError(
            f"condition.columns must name the captions in {printable(path)}, which has "
            f"{'both' if found else 'no'} {wanted}"
        )
    texts = [row.get(found[0]) for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(
                f"{printable(path)} must give {row[FILE_NAME]} a text in {found[0]}, got "
                f"{shortened(repr(text))}"
            )
    return [str(text) for text in texts]


def attribute_entries(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Of each row the given columns; what is not there is left open."""
    return [{name: row.get(name) for name in names} for row in rows]


def find_attributes(
    rows: Sequence[Row], columns: Sequence[str], path: Path
) -> AttributeConditionConfig:
    """Names and values of the attributes, each sorted as text.

    Raises:
        InputError: there is no such column, or one is no attribute.
    """
    present = dict.fromkeys(name for row in rows for name in row)
    for name in columns:
        if name not in present:
            raise InputError(
                f"condition.columns: {printable(path)} has no column {name!r}, there are "
                f"{', '.join(map(printable, present))}"
            )
    columns = columns or [own for own in present if own not in (FILE_NAME, *CAPTION_COLUMNS)]
    attributes = []
    for name in columns:
        values = {value for row in rows for value in attribute_values(row.get(name)) or ()}
        if not 0 < len(values) <= MOST_VALUES:
            raise InputError(
                f"condition.columns: {name!r} must have 1 to {MOST_VALUES} values to be an "
                f"attribute, got {len(values)} in {printable(path)}"
            )
        attributes.append(AttributeConfig(name=name, values=tuple(sorted(values))))
    if not attributes:
        raise InputError(f"condition: {printable(path)} has no columns of attributes")
    return AttributeConditionConfig(attributes=tuple(attributes))
