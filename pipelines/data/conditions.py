"""A condition for each image of a data set, from files beside the images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipelines.condition_config import ConditionSourceConfig
from pipelines.condition_inputs import SavedEncoder, attribute_rows
from pipelines.config import DataConfig, PriorRunConfig
from pipelines.data.captions import captions_of_source, encode_captions
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.data.embeddings import files_hash, open_embeddings, rows_by_name
from pipelines.data.folder_scan import METADATA_FILES, VECTOR_FILES, printable
from pipelines.data.metadata import attribute_entries, captions, find_attributes, read_metadata
from pipelines.run.checkpoints import check_sources, newest_sources
from pipelines.run.folder import load_run
from pipelines.text_encoders import HuggingFaceEncoder, TextEncoder
from prior import (
    AttributeConditionConfig,
    EmbeddingConditionConfig,
    PriorConfig,
    TextEncoderConfig,
    Tokens,
)
from tokenizer.storage.errors import InputError

_MOST_FOR_STATISTICS = 10_000
"""Images whose embeddings give mean and scale of the channels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """What the prior's conditioner takes, of each image of one split."""

    values: Tensor
    """A row for each image or for several, on the disk; tokens one after the other."""
    rows: Int64[np.ndarray, " items"]
    """Row of each image; of its first token."""
    mask: Bool[Tensor, "items tokens"] | None = None
    """Where an image has tokens, if these are tokens."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, items: Int64[np.ndarray, " batch"]) -> Tensor | Tokens:
        """The conditions of some images, as a copy."""
        rows = torch.from_numpy(self.rows[items])
        if self.mask is None:
            return self.values[rows]
        mask = self.mask[torch.from_numpy(items)]
        places = rows.unsqueeze(1) + torch.arange(mask.shape[1])
        return Tokens(self.values[places.where(mask, 0)], mask)

    def sample(self) -> Float[Tensor, "rows dim"]:
        """Vectors or tokens of a seeded choice of images, for the statistics of the channels."""
        inputs = self.at(chosen_items(len(self), _MOST_FOR_STATISTICS))
        vectors = inputs.embeddings[inputs.mask] if isinstance(inputs, Tokens) else inputs
        return vectors.float()


class ConditionedSplits(NamedTuple):
    """Conditions of the training and the validation images."""

    config: EmbeddingConditionConfig | AttributeConditionConfig
    """What the prior has to know of them."""
    train: Conditions
    validation: Conditions
    sources: dict[str, str]
    """Hashes of the files, and of the text encoder, by name."""


def trained_conditions(
    prior_dir: Path,
    prior: PriorConfig,
    data: DataConfig,
    images: tuple[ImageDataset, ImageDataset],
    device: torch.device,
) -> tuple[Conditions, Conditions] | None:
    """Conditions of training and validation images of a run of stage two, if it has any.

    Args:
        prior_dir: the run's folder.
        prior: its prior.
        data: where the images lie.
        images: for training and validation.
        device: on which texts are encoded, if they are no longer stored.

    Raises:
        InputError: they cannot be had, or are others than it was trained on.
    """
    if prior.condition is None:
        return None
    run = load_run(PriorRunConfig, prior_dir / "config.json")
    encoder = None
    if isinstance(prior.condition, EmbeddingConditionConfig) and prior.condition.text_encoder:
        encoder = SavedEncoder(prior.condition.text_encoder)
    found = load_conditions(run.condition, data, *images, encoder, device)
    check_sources(prior_dir, newest_sources(prior_dir), found.sources)
    return found.train, found.validation


class _Part(NamedTuple):
    """A file, and the images that it is for."""

    path: Path
    splits: list[list[str]]
    """Names of the images, split by split."""

    @property
    def names(self) -> list[str]:
        return [name for split in self.splits for name in split]


def load_conditions(
    config: ConditionSourceConfig,
    data: DataConfig,
    train: ImageDataset,
    validation: ImageDataset,
    text_encoder: TextEncoder | None,
    device: torch.device,
) -> ConditionedSplits:
    """Opens the files that `config` names, and finds the row of each image.

    Args:
        config: what is wanted; of kind vectors, text or attributes.
        data: where the images lie.
        train: training images.
        validation: validation images.
        text_encoder: for texts; None loads that of `config`, once the texts are found.
        device: on which texts are encoded.

    Raises:
        InputError: a file is missing or does not fit the images.
    """
    given = captions_of_source(train, validation) if config.kind == "text" else None
    if given is not None:
        return _of_texts(*given, config, data, text_encoder, device)
    if data.dataset not in ("folder", "files") or data.root is None:
        raise InputError(
            f"condition.kind must be class or none where data.dataset is {data.dataset!r}, got "
            f"{config.kind}"
        )
    names = [_names(images) for images in (train, validation)]
    if data.validation_root is None:
        parts = [_Part(_find_file(config, data.root), names)]
    else:
        roots = (data.root, data.validation_root)
        parts = [
            _Part(_find_file(config, root), [own]) for root, own in zip(roots, names, strict=True)
        ]
    sources = {
        f"{name} conditions": files_hash(part.path)
        for name, part in zip(("training", "validation"), parts, strict=False)
    }
    if config.kind == "vectors":
        return ConditionedSplits(*_vectors(parts), sources=sources)
    rows = [read_metadata(part.path, part.names) for part in parts]
    all_rows = [row for own in rows for row in own]
    sizes = [len(own) for own in names]
    if config.kind == "attributes":
        attributes = find_attributes(all_rows, config.columns, parts[0].path)
        entries = attribute_entries(all_rows, [own.name for own in attributes.attributes])
        values = attribute_rows(entries, attributes)
        of_train, of_validation = (Conditions(values, own) for own in _split(sizes))
        return ConditionedSplits(attributes, of_train, of_validation, sources)
    texts = [
        text
        for part, own in zip(parts, rows, strict=True)
        for text in captions(own, config.columns, part.path)
    ]
    splits = [texts[: sizes[0]], texts[sizes[0] :]]
    return _of_texts(splits, sources, config, data, text_encoder, device)


def _of_texts(
    splits: Sequence[list[str]],
    sources: dict[str, str],
    config: ConditionSourceConfig,
    data: DataConfig,
    text_encoder: TextEncoder | None,
    device: torch.device,
) -> ConditionedSplits:
    encoder = text_encoder or HuggingFaceEncoder(config.text_encoder)
    texts, sizes = [text for own in splits for text in own], list(map(len, splits))
    encoded = _encoded(texts, sizes, encoder, config.max_tokens, data.cache_dir, device)
    return ConditionedSplits(*encoded, {**sources, "text encoder": encoder.content_hash()})


def _encoded(
    texts: Sequence[str],
    sizes: Sequence[int],
    encoder: TextEncoder,
    max_tokens: int,
    cache_dir: Path,
    device: torch.device,
) -> tuple[EmbeddingConditionConfig, Conditions, Conditions]:
    """Tokens of the text of each image, split by split; equal texts are encoded once."""
    distinct = sorted(set(texts))
    number = {text: row for row, text in enumerate(distinct)}
    encoded = encode_captions(distinct, encoder, max_tokens, cache_dir, device)
    rows_of_texts = np.array([number[text] for text in texts], np.int64)
    config = EmbeddingConditionConfig(
        dim=encoded.values.shape[1],
        num_tokens=encoded.mask.shape[1],
        text_encoder=TextEncoderConfig(source=encoder.source, content_hash=encoder.content_hash()),
    )
    splits = []
    for own in _split(sizes):
        chosen = rows_of_texts[own]
        mask = encoded.mask[torch.from_numpy(chosen)]
        splits.append(Conditions(encoded.values, encoded.first[chosen], mask))
    train, validation = splits
    return config, train, validation


def _vectors(
    parts: Sequence[_Part],
) -> tuple[EmbeddingConditionConfig, Conditions, Conditions]:
    splits: list[Conditions] = []
    shapes = []
    for part in parts:
        embeddings, mask = open_embeddings(part.path)
        shapes.append(tuple(embeddings.shape[1:]))
        if shapes[-1] != shapes[0]:
            raise InputError(
                f"{printable(part.path)} must hold rows of shape {shapes[0]}, as "
                f"{printable(parts[0].path)} does, got {shapes[-1]}"
            )
        row_of = rows_by_name(part.path, len(embeddings), part.names)
        for names in part.splits:
            rows = np.array([row_of[name] for name in names], np.int64)
            splits.append(_rows_of(embeddings, mask, rows))
    num_tokens = shapes[0][0] if len(shapes[0]) == 2 else 0
    config = EmbeddingConditionConfig(dim=shapes[0][-1], num_tokens=num_tokens)
    train, validation = splits
    return config, train, validation


def _rows_of(embeddings: Tensor, mask: Tensor | None, rows: np.ndarray) -> Conditions:
    if embeddings.ndim == 2:
        return Conditions(embeddings, rows)
    num_tokens = embeddings.shape[1]
    if mask is None:
        mask = torch.ones(len(embeddings), num_tokens, dtype=torch.bool)
    return Conditions(embeddings.flatten(0, 1), rows * num_tokens, mask[torch.from_numpy(rows)])


def _split(sizes: Sequence[int]) -> list[np.ndarray]:
    """Rows of each split, where one follows the other."""
    return np.split(np.arange(sum(sizes), dtype=np.int64), np.cumsum(sizes)[:-1])


def _names(images: ImageDataset) -> list[str]:
    item_names = getattr(images, "item_names", None)
    if item_names is None:
        raise InputError("condition.kind must be class or none: the images have no file names")
    names: list[str] = item_names()
    return names


def _find_file(config: ConditionSourceConfig, root: Path) -> Path:
    """The file of `config` below the folder of the images.

    Raises:
        InputError: there is none, or several.
    """
    if config.file is not None:
        found = [root / config.file]
        suffixes = {Path(name).suffix for name in _default_files(config)}
        if found[0].suffix not in suffixes:
            raise InputError(
                f"condition.file must end in {' or '.join(sorted(suffixes))}, got "
                f"{printable(config.file)}"
            )
        if not found[0].is_file():
            raise InputError(f"condition.file: there is no {printable(found[0])}")
        return found[0]
    names = _default_files(config)
    found = [root / name for name in names if (root / name).is_file()]
    if len(found) != 1:
        how, word = ("both", " and ") if found else ("no", " or ")
        raise InputError(f"condition.file: {printable(root)} holds {how} {word.join(names)}")
    return found[0]


def _default_files(config: ConditionSourceConfig) -> tuple[str, ...]:
    return VECTOR_FILES if config.kind == "vectors" else METADATA_FILES
