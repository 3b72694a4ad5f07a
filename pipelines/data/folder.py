"""A folder of images: finding, splitting and decoding its files."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pipelines.config import DataConfig
from pipelines.data.dataset import Split
from pipelines.data.decoded_images import ImageBlock, ImageSource
from pipelines.data.decoding import (
    VERSION,
    Channels,
    DecodedImage,
    UnreadableImageError,
    decode_image,
    describe_conversion,
)
from pipelines.data.folder_scan import (
    OTHER_SUFFIX,
    SEARCHED,
    WITHIN,
    Finding,
    printable,
    scan_folder,
)
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

SHEETS = ("contact_sheet.png", "comparison.png")
"""What `generate` and `reconstruct` write beside their images."""
_FILES_PER_BLOCK = 64
_BYTES_PER_BLOCK = 2**25


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


def list_folder(
    root: Path, field: str, follow_links: bool = False, skip_unreadable: bool = False
) -> FolderListing:
    """Finds PNG, JPEG and WebP files by suffix: beside each other, or in one folder per class.

    Class folders are searched to any depth. `folder_scan.py` says what is left out, which is
    counted in warnings, and what is refused. `field` names the folder in errors.

    Raises:
        InputError: no such folder, no images in it, images beside class folders, or an entry
            that is refused.
    """
    if not root.is_dir():
        raise InputError(f"{field}: there is no folder {printable(root)}")
    scan = scan_folder(root, follow_links)
    if scan.refused and not skip_unreadable:
        name, reason = scan.refused[0]
        more = f" ({len(scan.refused) - 1} more are refused)" if len(scan.refused) > 1 else ""
        use_links = "set data.follow_links to use such links, or " if "link" in reason else ""
        raise InputError(
            f"{field}: {printable(root / name)} {reason}{more}; {use_links}"
            "set data.skip_unreadable to leave out what is refused"
        )
    for count, what in (
        (_count(scan.left_out, OTHER_SUFFIX), "files that are not PNG, JPEG or WebP"),
        (_count(scan.left_out, WITHIN) + _count(scan.left_out, SEARCHED), "links to folders"),
        (len(scan.refused), "files, links and folders that are refused"),
    ):
        if count:
            logger.warning("%s: ignored %d %s", printable(root), count, what)
    return arrange(root, scan.images, field)


def _count(findings: list[Finding], reason: str) -> int:
    return sum(finding.reason == reason for finding in findings)


def arrange(root: Path, names: list[str], field: str) -> FolderListing:
    """Sorts the images of a folder into its classes.

    Raises:
        InputError: there are none, or some beside class folders.
    """
    flat: list[str] = []
    by_class: dict[str, list[str]] = {}
    for name in names:
        if "/" in name:
            by_class.setdefault(name.split("/")[0], []).append(name)
        else:
            flat.append(name)
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


def folder_source(config: DataConfig, split: Split) -> ImageSource:
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
    listing = list_folder(config.root, "data.root", config.follow_links, config.skip_unreadable)
    if config.validation_root is None:
        chosen = _hold_out(listing, config, split)
        how = (
            f"{split} {len(chosen.names)} of {len(listing.names)} files "
            f"(validation share {config.validation_share:g}, seed {config.seed})"
        )
    else:
        other = list_folder(
            config.validation_root,
            "data.validation_root",
            config.follow_links,
            config.skip_unreadable,
        )
        validation = _match_classes(listing, other)
        chosen = listing if split == "train" else validation
        how = f"{split} {len(chosen.names)} files"
    return _source(f"folder-{split}", chosen, how, config)


def whole_folder_source(config: DataConfig, root: Path, field: str) -> ImageSource:
    """All images of another folder, decoded as those of `config` are.

    What the commands write beside images, sheets of many, is left out.

    Raises:
        InputError: a folder that does not fit; `field` names it.
    """
    listing = list_folder(root, field, config.follow_links, config.skip_unreadable)
    rows = [row for row, name in enumerate(listing.names) if name not in SHEETS]
    if len(rows) < len(listing.names):
        logger.warning("%s: left out %s", printable(root), " and ".join(SHEETS))
    chosen = listing.choose(rows)
    return _source("images", chosen, f"{len(rows)} files", config)


def _source(name: str, chosen: FolderListing, how: str, config: DataConfig) -> ImageSource:
    conversion = describe_conversion(config.image_size, config.channels)
    return ImageSource(
        name=name,
        description=(
            f"{chosen.root}, {how}, {len(chosen.class_names) or 'no'} classes; {conversion}"
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
        status = (root / name).stat()
    except OSError:  # a dangling link, say; reading it gives the error that names it
        return name, -1, -1
    return name, status.st_size, status.st_mtime_ns


def _hold_out(listing: FolderListing, config: DataConfig, split: Split) -> FolderListing:
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


def decode_files(
    root: Path, names: list[str], image_size: int, channels: Channels
) -> Iterator[list[DecodedImage | UnreadableImageError]]:
    """Reads files in blocks, several at once, in the given order."""

    def attempt(name: str) -> DecodedImage | UnreadableImageError:
        try:
            return decode_image(root / name, image_size, channels)
        except UnreadableImageError as error:
            return error
        except MemoryError as error:
            raise InputError(
                f"out of memory while decoding {printable(root / name)}: make the image smaller"
            ) from error

    files_per_block = min(_FILES_PER_BLOCK, max(1, _BYTES_PER_BLOCK // (channels * image_size**2)))
    # Pillow decodes outside of the interpreter's lock, so threads run side by side.
    with (
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        tqdm(total=len(names), unit=" images", desc="decoding", disable=None) as bar,
    ):
        for start in range(0, len(names), files_per_block):
            results = list(pool.map(attempt, names[start : start + files_per_block]))
            bar.update(len(results))
            yield results


def _decode(listing: FolderListing, config: DataConfig) -> Iterator[ImageBlock]:
    shape = (config.image_size, config.image_size, config.channels)
    files = zip(listing.names, listing.labels, strict=True)
    num_read = 0
    for results in decode_files(listing.root, listing.names, config.image_size, config.channels):
        images, labels, unreadable = [], [], []
        # The block first: zip would take a file too many at its end.
        for result, (name, label) in zip(results, files, strict=False):
            if not isinstance(result, UnreadableImageError):
                images.append(result.pixels)
                labels.append(label)
            elif config.skip_unreadable:
                unreadable.append(f"{printable(name)}: {result}")
            else:
                raise InputError(
                    f"{printable(listing.root / name)} is not a readable image: {result}; "
                    "set data.skip_unreadable to leave out such files"
                ) from result
        num_read += len(images)
        yield ImageBlock(
            np.array(images, np.uint8).reshape(-1, *shape),
            np.array(labels, np.int64),
            tuple(unreadable),
        )
    if num_read == 0:
        raise InputError(
            f"{listing.root}: none of {len(listing.names)} images of this split is readable"
        )
