"""A folder of images: finding, splitting and decoding its files."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from pipelines.config import DataConfig
from pipelines.image_cache import ImageBlock, ImageSource
from pipelines.image_decoding import (
    SUFFIXES,
    VERSION,
    UnreadableImageError,
    describe_conversion,
    read_image,
)
from tokenizer.pretrained import InputError

logger = logging.getLogger(__name__)

_FILES_PER_BLOCK = 64


class FolderListing(NamedTuple):
    """Image files of a folder, sorted by path, before any is opened."""

    root: Path
    names: list[str]
    """Paths below `root`, with forward slashes."""
    labels: list[int]
    """Index of each file's class; zeros without classes."""
    class_names: tuple[str, ...]
    """Sorted; empty for a flat folder."""

    def choose(self, rows: list[int]) -> "FolderListing":
        """The files of the given rows."""
        names, labels = [self.names[row] for row in rows], [self.labels[row] for row in rows]
        return self._replace(names=names, labels=labels)


def list_folder(root: Path, field: str) -> FolderListing:
    """Finds PNG, JPEG and WebP files by suffix: beside each other, or in one folder per class.

    Class folders are searched to any depth. Hidden files and folders are left out, as are other
    files, which are counted in a warning. `field` names the folder in errors.

    Raises:
        InputError: no such folder, no images in it, or images beside class folders.
    """
    if not root.is_dir():
        raise InputError(f"{field}: there is no folder {root}")
    flat: list[str] = []
    by_class: dict[str, list[str]] = {}
    num_others = 0
    for name in _find_files(root, field):
        if not name.lower().endswith(SUFFIXES):
            num_others += 1
        elif "/" in name:
            by_class.setdefault(name.split("/")[0], []).append(name)
        else:
            flat.append(name)
    if num_others:
        logger.warning("%s: ignored %d files that are not PNG, JPEG or WebP", root, num_others)
    class_names = tuple(sorted(by_class))
    if flat and by_class:
        raise InputError(
            f"{field}: {root} mixes {len(flat)} images with class folders, the first are "
            f"{min(flat)!r} and {class_names[0]!r}; put all images into class folders, or none"
        )
    if not flat and not by_class:
        raise InputError(f"{field}: {root} holds no PNG, JPEG or WebP images")
    if flat:
        return FolderListing(root, sorted(flat), [0] * len(flat), ())
    names = [name for class_name in class_names for name in sorted(by_class[class_name])]
    labels = [label for label, name in enumerate(class_names) for _ in by_class[name]]
    return FolderListing(root, names, labels, class_names)


def _find_files(root: Path, field: str) -> Iterator[str]:
    def complain(error: OSError) -> None:
        raise InputError(f"{field}: {error.filename} cannot be read: {error.strerror}")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=complain):
        # A link to a folder above would be followed for ever.
        above = {Path(folder).resolve(), *Path(folder).resolve().parents}
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and Path(folder, name).resolve() not in above
        ]
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                try:
                    path.as_posix().encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"{field}: {str(path)!a} is not a UTF-8 name") from error
                yield path.relative_to(root).as_posix()


def folder_source(config: DataConfig, split: Literal["train", "validation"]) -> ImageSource:
    """The images of one split of `config.root`, or of `config.validation_root`.

    Without `validation_root`, a share of the files of `root` is held out: the first ones of a
    permutation that depends on the seed and the number of files.

    Raises:
        InputError: a folder that does not fit, whichever split is asked for.
    """
    if config.root is None:
        raise InputError(
            "data.root must name a folder of images where data.dataset is 'folder', got None"
        )
    listing = list_folder(config.root, "data.root")
    if config.validation_root is None:
        chosen = _hold_out(listing, config, split)
        how = (
            f"{split} {len(chosen.names)} of {len(listing.names)} images "
            f"(validation share {config.validation_share:g}, seed {config.seed})"
        )
    else:
        validation = _match_classes(
            listing, list_folder(config.validation_root, "data.validation_root")
        )
        chosen = listing if split == "train" else validation
        how = f"{split} {len(chosen.names)} images"
    conversion = describe_conversion(config.image_size, config.channels)
    return ImageSource(
        name=f"folder-{split}",
        description=(
            f"{chosen.root}, {how}, {len(listing.class_names) or 'no'} classes; {conversion}"
        ),
        identity={
            "version": VERSION,
            "root": str(chosen.root.resolve()),
            "class_names": chosen.class_names,
            # Whether a file is readable can change without a trace in its time and size.
            "skip_unreadable": config.skip_unreadable,
            "files": [_fingerprint(chosen.root, name) for name in chosen.names],
        },
        produce=lambda: (chosen.class_names, _decode(chosen, config)),
    )


def _fingerprint(root: Path, name: str) -> tuple[str, int, int]:
    try:
        facts = (root / name).stat()
    except OSError:  # a dangling link, say; reading it gives the error that names it
        return name, -1, -1
    return name, facts.st_size, facts.st_mtime_ns


def _hold_out(
    listing: FolderListing, config: DataConfig, split: Literal["train", "validation"]
) -> FolderListing:
    num_images = len(listing.names)
    num_held_out = round(config.validation_share * num_images)
    if not 0 < num_held_out < num_images:
        raise InputError(
            "data.validation_share must leave images for training and for validation, "
            f"got {config.validation_share:g} of {num_images} images in {listing.root}"
        )
    # Raw output, which numpy keeps the same in all versions.
    bits = np.random.Philox(np.random.SeedSequence(config.seed)).random_raw(num_images)
    order = np.argsort(bits, kind="stable")
    rows = order[:num_held_out] if split == "validation" else order[num_held_out:]
    return listing.choose(np.sort(rows).tolist())


def _match_classes(training: FolderListing, validation: FolderListing) -> FolderListing:
    """The validation files, labeled by the classes of the training files."""
    if training.root.resolve() == validation.root.resolve():
        raise InputError(
            f"data.validation_root must not be data.root itself, got {validation.root}"
        )
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


def _decode(listing: FolderListing, config: DataConfig) -> Iterator[ImageBlock]:
    def attempt(name: str) -> np.ndarray | UnreadableImageError:
        try:
            return read_image(listing.root / name, config.image_size, config.channels)
        except UnreadableImageError as error:
            return error

    shape = (config.image_size, config.image_size, config.channels)
    num_read = 0
    # Pillow decodes outside of the interpreter's lock, so threads run side by side.
    with (
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        tqdm(total=len(listing.names), unit=" images", desc="decoding", disable=None) as bar,
    ):
        for start in range(0, len(listing.names), _FILES_PER_BLOCK):
            rows = slice(start, start + _FILES_PER_BLOCK)
            images, labels, unreadable = [], [], []
            names = listing.names[rows]
            for name, label, result in zip(
                names, listing.labels[rows], pool.map(attempt, names), strict=True
            ):
                if not isinstance(result, UnreadableImageError):
                    images.append(result)
                    labels.append(label)
                elif config.skip_unreadable:
                    unreadable.append(f"{name}: {result}")
                else:
                    raise InputError(
                        f"{listing.root / name} is not a readable image: {result}; "
                        "set data.skip_unreadable to leave out such files"
                    ) from result
            num_read += len(images)
            bar.update(len(names))
            yield ImageBlock(
                np.array(images, np.uint8).reshape(-1, *shape),
                np.array(labels, np.int64),
                tuple(unreadable),
            )
    if num_read == 0:
        raise InputError(f"{listing.root}: none of {len(listing.names)} images is readable")
