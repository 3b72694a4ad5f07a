"""A folder of images as a source: its files are found, split and decoded."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.config import DataConfig
from pipelines.data.conversion import Channels
from pipelines.data.dataset import Split
from pipelines.data.decoded_images import ImageBlock, ImageSource
from pipelines.data.decoding import (
    VERSION,
    DecodedImage,
    UnreadableImageError,
    decode_image,
    describe_conversion,
)
from pipelines.data.folder_listing import (
    FolderListing,
    check_usable,
    list_folder,
    training_folder,
)
from pipelines.data.folder_scan import printable
from pipelines.data.folder_split import check_apart, check_disjoint, hold_out, match_classes
from pipelines.data.sixteen_bits import ValueRanges
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

SHEETS = ("contact_sheet.png", "comparison.png")
"""What `generate` and `reconstruct` write beside their images."""
_FILES_PER_BLOCK = 64
_BYTES_PER_BLOCK = 2**25


def folder_source(config: DataConfig, split: Split) -> ImageSource:
    """The images of one split of `config.root`, or of `config.validation_root`.

    Without `validation_root`, about `validation_share` of the files of `root` are held out, each by
    a hash of the seed and its own name: other files have no part in it.

    Raises:
        InputError: a folder that does not fit, whichever split is asked for.
    """
    listing, how = split_listing(config, split)
    return _source(listing, how, config, split)


def split_listing(config: DataConfig, split: Split) -> tuple[FolderListing, str]:
    """The files of one split, and in words which they are.

    Raises:
        InputError: as `folder_source`.
    """
    root = training_folder(config)
    is_first = split == "train"  # of the two splits that each run opens
    options = (config.follow_links, config.skip_unreadable, config.folder_rules, is_first)
    listing = list_folder(root, "data.root", *options)
    if config.validation_root is None:
        chosen = hold_out(listing, config, split)
        how = (
            f"{split} {len(chosen.names)} of {len(listing.names)} files "
            f"(validation share {config.validation_share:g}, seed {config.seed})"
        )
    else:
        check_apart(root, config.validation_root, config.folder_rules)
        other = list_folder(config.validation_root, "data.validation_root", *options)
        if config.follow_links and config.folder_rules > 1:
            check_disjoint(listing, other)
        validation = match_classes(listing, other)
        chosen = listing if split == "train" else validation
        how = f"{split} {len(chosen.names)} files"
    return chosen, how


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
    return _source(listing.choose(rows), f"{len(rows)} files", config, None)


def _source(
    chosen: FolderListing, how: str, config: DataConfig, split: Split | None
) -> ImageSource:
    conversion = describe_conversion(config.image_size, config.channels, config.white_value)
    return ImageSource(
        name=f"folder-{split or 'whole'}",
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
        produce=lambda: (chosen.class_names, _decode(chosen, config, split)),
    )


def _fingerprint(root: Path, name: str) -> tuple[str, int, int]:
    try:
        status = (root / name).stat()
    except OSError:  # a dangling link, say; reading it gives the error that names it
        return name, -1, -1
    return name, status.st_size, status.st_mtime_ns


def decode_files(
    root: Path,
    names: list[str],
    image_size: int,
    channels: Channels,
    white_value: int | None = None,
) -> Iterator[list[DecodedImage | UnreadableImageError]]:
    """Reads files in blocks, several at once, in the given order."""

    def attempt(name: str) -> DecodedImage | UnreadableImageError:
        try:
            return decode_image(root / name, image_size, channels, white_value)
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


def _decode(
    listing: FolderListing, config: DataConfig, split: Split | None
) -> Iterator[ImageBlock]:
    shape = (config.image_size, config.image_size, config.channels)
    files = zip(listing.names, listing.labels, strict=True)
    read: list[str] = []
    values = ValueRanges()
    conversion = (config.image_size, config.channels, config.white_value)
    for results in decode_files(listing.root, listing.names, *conversion):
        images, labels, names, unreadable = [], [], [], []
        # The block first: zip would take a file too many at its end.
        for result, (name, label) in zip(results, files, strict=False):
            if not isinstance(result, UnreadableImageError):
                images.append(result.pixels)
                labels.append(label)
                names.append(name)
                values.add(result.value_range)
            elif config.skip_unreadable:
                unreadable.append(f"{printable(name)}: {result}")
            else:
                way_on = "set data.skip_unreadable to leave out such files"
                raise InputError(
                    f"{printable(listing.root / name)} is not a readable image: {result}; "
                    f"{way_on if split else 'repair or remove it'}"
                ) from result
        yield ImageBlock(
            np.array(images, np.uint8).reshape(-1, *shape),
            np.array(labels, np.int64),
            tuple(unreadable),
            names=tuple(names),
        )
        read += names
    # Runs of version 0.1 went on without.
    is_trained = split == "train" and config.folder_rules > 1
    check_usable(listing if is_trained else listing._replace(class_names=()), read)
    if values.num_suspicious:
        nothing = np.zeros((0, *shape), np.uint8), np.zeros(0, np.int64)
        yield ImageBlock(*nothing, (), (values.describe(),))
