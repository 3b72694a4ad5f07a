"""The images of a folder, sorted into its classes, before any is opened."""

import logging
import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipelines.config import DataConfig, FolderRules
from pipelines.data.folder_scan import (
    IS_GIF,
    OF_A_SYSTEM,
    OTHER_SUFFIX,
    SEARCHED,
    SUFFIXES,
    WITHIN,
    Finding,
    FolderScan,
    folders_without_images,
    printable,
    scan_folder,
)
from pipelines.data.formats import FORMATS
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_MOST_NAMED = 5
_TRAINING_NAMES = ("train", "training")
_VALIDATION_NAMES = ("val", "validation", "valid", "dev", "test", "testing")


class FolderListing(NamedTuple):
    """Image files of a folder, sorted by path, before any is opened."""

    root: Path
    names: list[str]
    """Paths below `root`, with forward slashes."""
    labels: list[int]
    """Index of each file's class; zeros without classes."""
    class_names: tuple[str, ...]
    """Sorted, numbers as such; empty for a flat folder."""

    def choose(self, rows: list[int]) -> "FolderListing":
        """The files of the given rows."""
        names, labels = [self.names[row] for row in rows], [self.labels[row] for row in rows]
        return self._replace(names=names, labels=labels)


def split_folders(root: Path) -> tuple[Path, Path | None]:
    """Folders of training and of validation images: `root` itself, or train/ and val/ in it.

    train/ alone is taken where there is nothing beside it.
    """
    train, validation = (
        next((root / name for name in names if (root / name).is_dir()), None)
        for names in (_TRAINING_NAMES, _VALIDATION_NAMES)
    )
    if train is None or (validation is None and len(list(root.iterdir())) > 1):
        return root, None
    return train, validation


def training_folder(config: DataConfig) -> Path:
    """`config.root`.

    Raises:
        InputError: it is not given.
    """
    if config.root is None:
        raise InputError(
            "data.root must name a folder of images where data.dataset is "
            f"{config.dataset!r}, got None"
        )
    return config.root


def check_any_image(root: Path, field: str) -> None:
    """Checks as fast as can be that there is an image, which one file may show.

    Raises:
        InputError: there is none.
    """
    files = (name for _, _, names in os.walk(root, followlinks=True) for name in names)
    if not any(name.lower().endswith(SUFFIXES) for name in files):
        find_images(root, field, follow_links=True, skip_unreadable=True, warns=False)


def find_images(
    root: Path,
    field: str,
    follow_links: bool = False,
    skip_unreadable: bool = False,
    rules: FolderRules = 2,
    warns: bool = True,
) -> FolderScan:
    """Finds image files by suffix, to any depth, for all commands that take a folder.

    `folder_scan.py` says what is left out, which is counted in warnings, and what is refused.
    `field` names the folder in errors.

    Raises:
        InputError: no such folder, no images in it, or an entry that is refused.
    """
    if not root.is_dir():
        raise InputError(f"{field}: there is no folder {printable(root)}")
    scan = scan_folder(root, follow_links, rules)
    if scan.refused and not skip_unreadable:
        name, reason = scan.refused[0]
        more = f" ({len(scan.refused) - 1} more are refused)" if len(scan.refused) > 1 else ""
        way_on = "; set data.follow_links to use such links, or" if "link" in reason else ";"
        way_on += " set data.skip_unreadable to leave out what is refused"
        # Other commands than training have no such options.
        way_on = way_on if field.startswith("data.") else ""
        raise InputError(f"{field}: {printable(root / name)} {reason}{more}{way_on}")
    check_found(root, scan, field)
    for count, what in (
        (_count(scan.left_out, IS_GIF), "GIF files, which are not read"),
        (_count(scan.left_out, OTHER_SUFFIX), f"files that are not {FORMATS}"),
        (_count(scan.left_out, WITHIN) + _count(scan.left_out, SEARCHED), "links to folders"),
        (_count(scan.left_out, OF_A_SYSTEM), "folders of thumbnails and the like"),
        (len(scan.refused), "files, links and folders that are refused"),
    ):
        if count and warns:
            logger.warning("%s: ignored %d %s", printable(root), count, what)
    return scan


def list_folder(
    root: Path,
    field: str,
    follow_links: bool = False,
    skip_unreadable: bool = False,
    rules: FolderRules = 2,
    warns: bool = True,
) -> FolderListing:
    """The images that `find_images` finds: beside each other, or in one folder per class.

    What looks like a mistake is said in warnings, unless `warns` is off: for the second split.

    Raises:
        InputError: as `find_images`, or images beside class folders.
    """
    scan = find_images(root, field, follow_links, skip_unreadable, rules, warns)
    listing = arrange(root, scan.images, field, rules)
    for warning in doubts(scan, listing) if warns else ():
        logger.warning("%s: %s", printable(root), warning)
    return listing


def doubts(scan: FolderScan, listing: FolderListing) -> list[str]:
    """What is used, or left out, but perhaps not meant to be."""
    warnings = []
    empty = [repr(name) for name in folders_without_images(scan)]
    if empty:
        more = f" and {len(empty) - _MOST_NAMED} more" if len(empty) > _MOST_NAMED else ""
        warnings.append(
            f"nothing in {', '.join(empty[:_MOST_NAMED])}{more} is used, so that there is no such "
            f"class; {FORMATS} files are read"
        )
    by_name = {name.lower(): name for name in listing.class_names}
    training = next((by_name[name] for name in _TRAINING_NAMES if name in by_name), None)
    validation = next((by_name[name] for name in _VALIDATION_NAMES if name in by_name), None)
    root = shlex.quote(str(listing.root))
    inside = shlex.quote(str(listing.root / (validation or "")))
    if training is not None:
        option = f" --data.validation-root {inside}" if validation else ""
        warnings.append(
            f"{training!r} is taken for a class; if it is a split, give --data.root "
            f"{shlex.quote(str(listing.root / training))}{option}"
        )
    elif validation is not None:
        outside = shlex.quote(f"{listing.root}-{validation}")
        warnings.append(
            f"{validation!r} is taken for a class, and trained on; if it is a split, "
            f"mv {inside} {outside} and give --data.root {root} --data.validation-root {outside}"
        )
    return warnings


def check_found(root: Path, scan: FolderScan, field: str) -> None:
    """Refuses a folder without images.

    Raises:
        InputError: it is one.
    """
    if not scan.images:
        num_gif = _count(scan.left_out, IS_GIF)
        found = f", only {num_gif} GIF files, which are not read" if num_gif else ""
        raise InputError(f"{field}: {printable(root)} holds no {FORMATS} images{found}")


def _count(findings: list[Finding], reason: str) -> int:
    return sum(finding.reason == reason for finding in findings)


def arrange(root: Path, names: list[str], field: str, rules: FolderRules = 2) -> FolderListing:
    """Sorts the images of a folder into its classes; names that are whole numbers, as numbers.

    Raises:
        InputError: some lie beside class folders.
    """
    flat: list[str] = []
    by_class: dict[str, list[str]] = {}
    for name in names:
        if "/" in name:
            by_class.setdefault(name.split("/")[0], []).append(name)
        else:
            flat.append(name)
    class_names = tuple(sorted(by_class, key=number_first if rules > 1 else None))
    if flat and by_class:
        raise InputError(
            f"{field}: {root} mixes {len(flat)} images with class folders, the first are "
            f"{min(flat)!r} and {class_names[0]!r}; put all images into class folders, or none"
        )
    if flat:
        return FolderListing(root, sorted(flat), [0] * len(flat), ())
    names = [name for class_name in class_names for name in sorted(by_class[class_name])]
    labels = [label for label, name in enumerate(class_names) for _ in by_class[name]]
    return FolderListing(root, names, labels, class_names)


def number_first(name: str) -> tuple[bool, int, str]:
    """A key to sort names by: whole numbers as such, then words."""
    is_number = name.isascii() and name.isdigit()
    return not is_number, int(name) if is_number else 0, name


def check_usable(listing: FolderListing, usable: Collection[str]) -> None:
    """Refuses a folder, or a class in it, without a single image to learn from.

    Args:
        listing: the files for training.
        usable: those that are readable.

    Raises:
        InputError: there is such a class; the first is named.
    """
    if not usable:
        raise InputError(
            f"{printable(listing.root)}: none of {len(listing.names)} images is readable"
        )
    read = set(usable)
    files = zip(listing.names, listing.labels, strict=True)
    labels = {label for name, label in files if name in read}
    empty = [name for label, name in enumerate(listing.class_names) if label not in labels]
    if empty:
        more = f", nor have {len(empty) - 1} more" if len(empty) > 1 else ""
        raise InputError(
            f"{printable(listing.root)}: the class {empty[0]!r} has no readable image to train on"
            f"{more}; repair its files, or remove its folder"
        )
