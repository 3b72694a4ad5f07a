"""Which files of a folder are for training, and which for validation."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.config import DataConfig, FolderRules
from pipelines.data.dataset import Split
from pipelines.data.folder_listing import FolderListing
from tokenizer.storage.errors import InputError


def hold_out(listing: FolderListing, config: DataConfig, split: Split) -> FolderListing:
    """One split of a folder of which about `config.validation_share` is held out.

    Raises:
        InputError: nothing is left for one of the splits.
    """
    by_rules = _hold_out_by_number if config.folder_rules == 1 else _hold_out_by_name
    held_out = by_rules(listing, config)
    if not 0 < sum(held_out) < len(held_out):
        raise InputError(
            "data.validation_share must leave images for training and for validation, "
            f"got {config.validation_share:g} of {len(held_out)} images in {listing.root}"
        )
    return listing.choose(
        [row for row, is_out in enumerate(held_out) if is_out == (split == "validation")]
    )


def _hold_out_by_name(listing: FolderListing, config: DataConfig) -> list[bool]:
    """Which files are held out: those with a low hash, but not all of a class.

    At least one is held out, so that two images make a folder.
    """
    hashes = [
        int.from_bytes(hashlib.sha256(f"{config.seed}/{name}".encode()).digest()[:8], "big")
        for name in listing.names
    ]
    rows = range(len(hashes))
    last_of_class: dict[int, int] = {}  # by label, the row that stays for training in any case
    for row in rows:
        best = last_of_class.setdefault(listing.labels[row], row)
        if hashes[row] > hashes[best]:
            last_of_class[listing.labels[row]] = row
    kept = set(last_of_class.values())
    bound = int(config.validation_share * 2**64)
    held_out = [hashes[row] < bound and row not in kept for row in rows]
    if not any(held_out):
        for row in sorted(set(rows) - kept, key=lambda row: hashes[row])[:1]:
            held_out[row] = True
    return held_out


def _hold_out_by_number(listing: FolderListing, config: DataConfig) -> list[bool]:
    """As version 0.1: a permutation of so many files as there are."""
    num_images = len(listing.names)
    # Raw output, which numpy keeps the same in all versions.
    bits = np.random.Philox(np.random.SeedSequence(config.seed)).random_raw(num_images)
    order = np.argsort(bits, kind="stable")
    held_out = np.zeros(num_images, np.bool_)
    held_out[order[: round(config.validation_share * num_images)]] = True
    return [bool(is_out) for is_out in held_out]


def check_apart(root: Path, validation_root: Path, rules: FolderRules) -> None:
    """Refuses a folder within the other: the same images would be in both.

    Raises:
        InputError: they are so.
    """
    training, validation = root.resolve(), validation_root.resolve()
    if training == validation:
        raise InputError(
            f"data.validation_root must not be data.root itself, got {validation_root}"
        )
    inner = (training.is_relative_to(validation), validation.is_relative_to(training))
    if rules > 1 and any(inner):
        raise InputError(
            "data.validation_root must lie beside data.root, not one in the other: images would be "
            f"trained on that are to validate; got {validation_root} and {root}"
        )


def check_disjoint(training: FolderListing, validation: FolderListing) -> None:
    """Refuses a file of both, which links can lead to.

    Raises:
        InputError: there is one; the first is named.
    """
    held_out = {place for _, place in _places(validation)}
    for name, place in _places(training):
        if place in held_out:
            raise InputError(
                f"data.follow_links: {training.root / name} is also below {validation.root}: it "
                "would be trained on and is to validate; remove the link to it"
            )


def _places(listing: FolderListing) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names, each with where the file itself lies: device and number there."""
    for name in listing.names:
        with contextlib.suppress(OSError):  # a link to nothing is named when it is read
            status = (listing.root / name).stat()
            yield name, (status.st_dev, status.st_ino)


def match_classes(training: FolderListing, validation: FolderListing) -> FolderListing:
    """The validation files, labeled by the classes of the training files.

    Raises:
        InputError: only one of them has classes, or a class is unknown in training.
    """
    for one, other in ((training, validation), (validation, training)):
        if one.class_names and not other.class_names:
            raise InputError(
                f"data.validation_root: {one.root} has class folders, but {other.root} has none"
            )
    unknown = sorted(set(validation.class_names) - set(training.class_names))
    if unknown:
        raise InputError(
            f"data.validation_root: {validation.root} has the class {unknown[0]!r}, "
            f"which {training.root} lacks"
        )
    index = {name: label for label, name in enumerate(training.class_names)}
    labels = [index[validation.class_names[label]] if index else 0 for label in validation.labels]
    return validation._replace(labels=labels, class_names=training.class_names)
