"""What the codes of a set of images say: of the pixels, of the class, and of which are alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import one_hot

from pipelines.data.dataset import ImageDataset
from pipelines.evaluation.metrics import (
    ImageErrors,
    entropy,
    image_errors,
    reconstruction_metrics,
)
from pipelines.images import to_float, to_uint8
from tokenizer import Tokenizer

BATCH = 100
"""Images at a time."""
NUM_SHUFFLES = 20
BITS_PER_NAT = float(1 / np.log(2))


class EncodedImages(NamedTuple):
    """Images with their hard codes, on the CPU."""

    images: UInt8[Tensor, "images channels height width"]
    indices: list[Int64[Tensor, "images _ _ _"]]
    """Of each group, coarse to fine, (N, depth, h, w)."""
    labels: Int64[Tensor, " images"]
    """Classes; zeros without."""

    @property
    def layers(self) -> list[Int64[Tensor, "images _ _"]]:
        """Indices of each layer, coarse to fine over all groups."""
        return [layer for group in self.indices for layer in group.unbind(1)]

    def first(self, count: int) -> "EncodedImages":
        """The first of the images."""
        indices = [group[:count] for group in self.indices]
        return EncodedImages(self.images[:count], indices, self.labels[:count])


def encode_images(tokenizer: Tokenizer, dataset: ImageDataset, items: np.ndarray) -> EncodedImages:
    """These images of a data set, and their codes."""
    images = dataset.images_at(items)
    labels = torch.from_numpy(dataset.labels[items])
    return EncodedImages(images, encode(tokenizer, images), labels)


def encode(
    tokenizer: Tokenizer, images: UInt8[Tensor, "images channels height width"]
) -> list[Int64[Tensor, "images _ _ _"]]:
    """Hard codes of any number of images, on the CPU."""
    device = next(tokenizer.parameters()).device
    parts = [tokenizer.encode(to_float(part).to(device)) for part in torch.split(images, BATCH)]
    return [torch.cat(group).cpu() for group in zip(*parts, strict=True)]


def decode(
    tokenizer: Tokenizer, indices: Sequence[Tensor], num_layers: int | None = None
) -> UInt8[Tensor, "images channels height width"]:
    """Images of any number of codes, on the CPU."""
    parts = zip(*(torch.split(group, BATCH) for group in indices), strict=True)
    return torch.cat([to_uint8(tokenizer.decode(part, num_layers)).cpu() for part in parts])


def errors_by_layer(tokenizer: Tokenizer, encoded: EncodedImages) -> list[dict[str, float]]:
    """`reconstruction_metrics` of the first layer alone, of the first two, and so on."""
    metrics = []
    for number in range(1, len(encoded.layers) + 1):
        decoded = decode(tokenizer, encoded.indices, number)
        parts = torch.split(encoded.images, BATCH), torch.split(decoded, BATCH)
        errors = [image_errors(*pair) for pair in zip(*parts, strict=True)]
        joined = ImageErrors(*(torch.cat(values) for values in zip(*errors, strict=True)))
        metrics.append(reconstruction_metrics(joined))
    return metrics


class MutualInformation(NamedTuple):
    """Of the code at a random place of a random image with the class of that image, in bits."""

    bits: float
    """The plug-in estimate less its bias; of independent codes about 0, also a little below."""
    plug_in_bits: float
    """H(code) + H(class) - H(code, class) of the counts."""
    shuffled_bits: float
    """The bias: the mean plug-in estimate with the classes shuffled among the images."""


def class_counts(
    codes: Int64[Tensor, "images _ _"], labels: Int64[Tensor, " images"], num_codes: int
) -> Int64[Tensor, "classes codes"]:
    """How often each code occurs in images of each class."""
    return _class_counts(code_histograms(codes, num_codes), labels)


def code_histograms(
    codes: Int64[Tensor, "images _ _"], num_codes: int
) -> Float[Tensor, "images codes"]:
    """How often each code of a layer occurs in each image."""
    flat = codes.flatten(1)
    counts = torch.zeros(len(flat), num_codes, dtype=torch.float64)
    return counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))


def _class_counts(
    histograms: Float[Tensor, "images codes"], labels: Int64[Tensor, " images"]
) -> Int64[Tensor, "classes codes"]:
    return (one_hot(labels).double().T @ histograms).round().long()


def class_information(
    codes: Int64[Tensor, "images _ _"], labels: Int64[Tensor, " images"], num_codes: int
) -> MutualInformation:
    """Mutual information of a layer's codes with the class, wherever in the image they stand.

    Codes of one image depend on each other, so that corrections for independent samples (Miller
    and Madow) are too small. Shuffling classes among whole images keeps that dependence; what is
    found then is bias. Where codes tell nearly all of the class it corrects too much.
    """
    histograms = code_histograms(codes, num_codes)
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        _information(
            _class_counts(histograms, labels[torch.randperm(len(labels), generator=generator)])
        )
        for _ in range(NUM_SHUFFLES)
    ]
    plug_in, bias = _information(_class_counts(histograms, labels)), float(np.mean(shuffled))
    return MutualInformation(plug_in - bias, plug_in, bias)


def _information(counts: Int64[Tensor, "classes codes"]) -> float:
    """In bits, of the distribution with these counts."""
    nats = entropy(counts.sum(0)) + entropy(counts.sum(1)) - entropy(counts.flatten())
    return BITS_PER_NAT * nats


def class_entropy(labels: Int64[Tensor, " images"]) -> float:
    """Bits of the class of a random image: the most that anything can tell of it."""
    return BITS_PER_NAT * entropy(labels.bincount())


def shared_codes(encoded: EncodedImages) -> Float[Tensor, "images images"]:
    """Share of places at which two images have the same code, mean over layers."""
    layers = [layer.flatten(1).to(torch.int32) for layer in encoded.layers]
    rows = [
        torch.stack([(layer == layer[item]).float().mean(1) for layer in layers]).mean(0)
        for item in range(len(encoded.labels))
    ]
    return torch.stack(rows)


def nearest_others(
    similarity: Float[Tensor, "images images"], count: int
) -> Int64[Tensor, "images count"]:
    """Of each image the most similar others, from the most similar on."""
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return others.topk(min(count, len(others) - 1), 1).indices


def same_class_share(
    neighbors: Int64[Tensor, "images count"], labels: Int64[Tensor, " images"]
) -> float:
    """Share of images of which the nearest other is of the same class."""
    return (labels[neighbors[:, 0]] == labels).double().mean().item()


def same_class_chance(labels: Int64[Tensor, " images"]) -> float:
    """The same for another image at random."""
    counts, total = labels.bincount().double(), len(labels)
    return (counts * (counts - 1)).sum().item() / (total * (total - 1))
