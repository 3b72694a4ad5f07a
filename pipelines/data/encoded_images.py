"""Images that stay encoded, wherever they lie, and are decoded each time they are asked for."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from pipelines.config import DataConfig
from pipelines.data.augmentation import RandomCrop, draw, jittered
from pipelines.data.decoding import UnreadableImageError, decode_content, describe_conversion
from pipelines.data.folder_scan import printable
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

_MOST_IN_PLACE = 1_000
"""Images of its class that are tried in place of an unreadable one."""
_MOST_SEARCHED = 100_000
"""Images after it among which they are sought."""


@runtime_checkable
class ImageStore(Protocol):
    """Encoded images with random access, in any thread and in processes that are forked."""

    def read(self, row: int) -> bytes:
        """The file; where it is missing or cut short, an OSError or a ValueError says so.

        Raises:
            InputError: not this file but its source cannot be read.
        """

    def name(self, row: int) -> str:
        """What to call it in messages; its suffix is that of its format."""


class TrainingImages(NamedTuple):
    """Images of a micro-batch, and what could not be read."""

    images: UInt8[Tensor, "batch channels height width"]
    unreadable: Mapping[int, str]
    """By item, why it was left out."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImages:
    """An `ImageDataset` over encoded images.

    Where unreadable images are to be skipped, the next readable one of the same class takes the
    place of each, so that the number of images is known without decoding them.
    """

    store: ImageStore
    rows: Int[np.ndarray, " items"] | None
    """Of the store, the images of this split; None: all of them."""
    labels: Int64[np.ndarray, " items"]
    class_names: tuple[str, ...]
    fingerprint: str
    description: str
    config: DataConfig
    _unreadable: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def reading(self) -> str:
        """For people."""
        count = self.config.reading.num_workers
        how = f"{count} worker processes" if count else "a thread"
        return f"{self.config.dataset}, decoded each time by {how}"

    def images_at(
        self, item_indices: Int64[np.ndarray, " batch"]
    ) -> UInt8[Tensor, "batch channels height width"]:
        """The chosen images, in the given order, cropped at the center."""
        # Pillow decodes outside of the interpreter's lock, so threads run side by side.
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            batch = self._batch(pool.map(self._decode_or_next, item_indices.tolist()))
        self.note_unreadable(batch.unreadable)
        return batch.images

    def training_images(
        self, item_indices: Int64[np.ndarray, " batch"], seed: int, step: int
    ) -> TrainingImages:
        """The chosen images as they are at a step, decoded one after the other."""
        return self._batch(
            self._decode_or_next(item, (seed, step)) for item in item_indices.tolist()
        )

    def note_unreadable(self, unreadable: Mapping[int, str]) -> None:
        """Counts what was left out, and says so in warnings: the first, the second, the fourth."""
        for item, reason in unreadable.items():
            if item not in self._unreadable:
                self._unreadable[item] = reason
                count = len(self._unreadable)
                if count & (count - 1) == 0:
                    logger.warning(
                        "%s: %d unreadable images left out so far, others of their class in their "
                        "place; the last is %s",
                        self.description,
                        count,
                        reason,
                    )

    def _batch(self, decoded: Iterable[tuple[np.ndarray, Mapping[int, str]]]) -> TrainingImages:
        images: list[np.ndarray] = []
        unreadable: dict[int, str] = {}
        for pixels, reasons in decoded:
            images.append(pixels)
            unreadable |= reasons
        size, channels = self.config.image_size, self.config.channels
        stacked = np.empty((len(images), channels, size, size), np.uint8)
        for row, pixels in enumerate(images):
            stacked[row] = pixels.transpose(2, 0, 1)
        return TrainingImages(torch.from_numpy(stacked), unreadable)

    def _decode_or_next(
        self, item: int, moment: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """An image, or the next of its class that is readable, and what is not."""
        unreadable: dict[int, str] = {}
        for candidate in self._with_class_of(item):
            try:
                return self._decode(candidate, moment), unreadable
            except UnreadableImageError as error:
                name = printable(self.store.name(self._row(candidate)))
                reason = f"{name} is not a readable image: {error}"
                if not self.config.skip_unreadable:
                    raise InputError(
                        f"{reason}; set data.skip_unreadable to leave out such files"
                    ) from error
                unreadable[candidate] = reason
        raise InputError(f"{next(iter(unreadable.values()))}, nor are {_MOST_IN_PLACE} after it")

    def _with_class_of(self, item: int) -> Iterable[int]:
        yield item
        count = min(_MOST_SEARCHED, len(self))
        following = np.arange(item + 1, item + count) % len(self)
        yield from following[self.labels[following] == self.labels[item]][:_MOST_IN_PLACE].tolist()

    def _row(self, item: int) -> int:
        return item if self.rows is None else int(self.rows[item])

    def _decode(self, item: int, moment: tuple[int, int] | None) -> np.ndarray:
        """One image; in training, as it is at a `moment`: seed and step.

        Raises:
            UnreadableImageError: it is missing or damaged.
        """
        config, reading = self.config, self.config.reading
        row = self._row(item)
        name = self.store.name(row)
        try:
            content = self.store.read(row)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise UnreadableImageError(reason) from error
        drawn = draw(*moment, item) if moment is not None and is_augmented(config) else None
        crop = RandomCrop(drawn, reading.crop_area) if drawn and reading.crop_area < 1 else None
        least_side = math.ceil(config.image_size / (crop.least_share if crop else 1))
        try:
            pixels = decode_content(
                *(content, name, config.image_size, config.channels, config.white_value),
                least_side=least_side if reading.draft else None,
                crop=crop,
            ).pixels
        except MemoryError as error:
            raise InputError(f"out of memory while {error}: make the image smaller") from error
        if drawn is not None and reading.color_jitter > 0:
            pixels = jittered(pixels, drawn, reading.color_jitter)
        return pixels


def is_augmented(config: DataConfig) -> bool:
    """Whether training images are cropped or colored at random."""
    return config.reading.crop_area < 1 or config.reading.color_jitter > 0


def describe_decoding(config: DataConfig) -> str:
    """What happens to each image, in words."""
    draft = ", large JPEG decoded at a smaller size" if config.reading.draft else ""
    size, channels = config.image_size, config.channels
    return describe_conversion(size, channels, config.white_value) + draft
