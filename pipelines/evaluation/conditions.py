"""What generated images are conditioned on where they are compared with a reference."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.data.conditions import Conditions
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.reference import Reference, SavedStatistics
from prior import PriorConfig, Tokens
from tokenizer.storage.errors import InputError
from tokenizer.storage.hashes import weights_hash

Which = Literal["as_reference", "in_turn"]


def reference_labels(
    prior: PriorConfig,
    train: ImageDataset,
    reference: Reference,
    which: Which,
    num_images: int,
    seed: int,
) -> tuple[Tensor | None, str]:
    """A label for each generated image, and in words which they are.

    Raises:
        InputError: classes are to come in turn, of which there are none.
    """
    if not prior.num_classes and not prior.has_custom_conditioner:
        return None, "none"
    rows = np.arange(num_images)
    if which == "in_turn":
        if prior.has_custom_conditioner:
            raise InputError("labels must be 'as_reference' for a prior with another conditioner")
        return torch.from_numpy(rows % prior.num_classes), "classes in turn"
    numbers = {name: label for label, name in enumerate(train.class_names)}
    images, whose = train, "those of training images"
    if not isinstance(reference, SavedStatistics) and (
        reference.class_names == train.class_names
        or (reference.class_names and numbers.keys() >= set(reference.class_names))
    ):
        images, whose = reference, "those of the reference images"
    items = chosen_items(len(images), num_images, seed)
    labels = images.labels[items[rows % len(items)]]
    if images.class_names != train.class_names:
        labels = np.array([numbers[images.class_names[label]] for label in labels])
    return torch.from_numpy(labels), whose


def reference_conditions(
    conditions: tuple[Conditions, Conditions],
    splits: tuple[ImageDataset, ImageDataset],
    reference: Reference,
    which: Which,
    num_images: int,
    seed: int,
) -> tuple[Tensor | Tokens, str]:
    """A condition for each generated image, and in words whose they are.

    Those of the reference images if they are one of the splits, otherwise of training images.

    Raises:
        InputError: classes are to come in turn, of which there are none.
    """
    if which == "in_turn":
        raise InputError("labels must be 'as_reference' for a prior without classes")
    of_reference = [reference is images for images in splits]
    chosen = conditions[of_reference.index(True)] if any(of_reference) else conditions[0]
    items = chosen_items(len(chosen), num_images, seed)
    whose = "the reference" if any(of_reference) else "training"
    rows = items[np.arange(num_images) % len(items)]
    return chosen.at(rows), f"conditions of {whose} images"


def given_hash(given: Tensor | Tokens | None) -> str:
    """Of the labels or conditions of all images."""
    if given is None:
        return "none"
    if isinstance(given, Tensor):
        return weights_hash({"given": given})
    return weights_hash({"embeddings": given.embeddings, "mask": given.mask})
