"""Metrics of generated images in memory that does not grow with their number.

Features are read by blocks of `BLOCK_ROWS` rows, several times where a metric needs it: they lie in
memory, or in shares on disk (`StoredRows`), which is what makes the memory constant. Beside blocks
only a number per image is held. Each figure is that of torch-fidelity's function of the whole
matrices: bit for bit if a block holds them, and otherwise to rounding in float64.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from pipelines.evaluation.rows import BLOCK_ROWS, Rows, block, blocks
from tokenizer.storage.errors import InputError

MIN_FITTED = 2
"""Images that a covariance takes."""


class Statistics(NamedTuple):
    """The Gaussian that a Fréchet distance sees of a set of images."""

    mean: Float64[np.ndarray, " dim"]
    covariance: Float64[np.ndarray, "dim dim"]


def fit_gaussian(features: Rows, count: int | None = None) -> Statistics:
    """Mean and unbiased covariance of all rows, or of the first `count`.

    Blocks are centered on their own means and then merged (Chan, Golub and LeVeque 1983), so that
    features far from zero lose no digits, as they would in sums of products.

    Raises:
        InputError: there are fewer than two images.
    """
    number_of_all = len(features) if count is None else count
    if number_of_all < MIN_FITTED:
        raise InputError(f"num_images must be >= {MIN_FITTED} for a distance, got {number_of_all}")
    total, mean, scatter = 0, np.zeros(1), np.zeros((1, 1))
    for rows in blocks(features, count):
        own = rows.numpy()
        number, own_mean = len(own), own.mean(axis=0)
        own = own - own_mean
        shift = own_mean - mean
        if total == 0:
            mean, scatter = own_mean, own.T @ own
        else:
            scatter += own.T @ own
            scatter += np.outer(shift, shift * (total * number / (total + number)))
            mean = mean + shift * (number / (total + number))
        total += number
    return Statistics(mean, scatter * (1 / (total - 1)))


def inception_score(logits: Rows, num_splits: int, seed: int) -> float:
    """Mean over splits of the shuffled images of exp(KL(p(class | image) || p(class)))."""
    order = np.random.RandomState(seed).permutation(len(logits))
    scores = []
    for split in range(num_splits):
        start, stop = (part * len(order) // num_splits for part in (split, split + 1))
        parts = [order[i : min(i + BLOCK_ROWS, stop)] for i in range(start, stop, BLOCK_ROWS)]
        sums = torch.stack([block(logits, part).softmax(1).sum(0) for part in parts])
        log_marginal = (sums.sum(0) / (stop - start)).log()
        divergence = 0.0
        for part in parts:
            own = block(logits, part)
            divergence += (own.softmax(1) * (own.log_softmax(1) - log_marginal)).sum().item()
        scores.append(math.exp(divergence / (stop - start)))
    return float(np.mean(scores))


def kernel_distance(
    generated: Rows, reference: Rows, num_subsets: int, subset_size: int, seed: int
) -> float:
    """Mean of the unbiased squared MMD, cubic kernel, over subsets of both sides.

    Subsets are a function of (seed, numbers of images): those that torch-fidelity draws. Their
    rows are read when they are due, so the memory is that of one subset.
    """
    draws = np.random.RandomState(seed)
    distances = []
    for _ in range(num_subsets):
        sides = [
            block(side, draws.choice(len(side), subset_size, replace=False)).numpy()
            for side in (generated, reference)
        ]
        distances.append(kernel_mmd(*sides))
    return float(np.mean(distances))


def precision_and_recall(
    generated: Rows, reference: Rows, num_neighbors: int
) -> tuple[float, float]:
    """Shares of generated images among the reference images, and the other way round.

    An image is among others if it is no farther from one of them than that one's `num_neighbors`-th
    neighbor on its own side. Distances are taken between two blocks at a time.
    """
    shares = []
    for images, others in ((generated, reference), (reference, generated)):
        is_inside = _is_among(images, others, _radii(others, num_neighbors))
        shares.append(is_inside.float().mean().item())
    precision, recall = shares
    return precision, recall


def _radii(points: Rows, num_neighbors: int) -> Float64[Tensor, " points"]:
    """Distance of each point from its neighbor of that number; itself is not one."""
    radii = []
    for own in blocks(points):
        nearest = torch.empty(len(own), 0, dtype=torch.float64)
        for others in blocks(points):
            distances = torch.cat([nearest, torch.cdist(own, others)], 1)
            nearest = distances.topk(num_neighbors + 1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _is_among(
    points: Rows, centers: Rows, radii: Float64[Tensor, " centers"]
) -> Bool[Tensor, " points"]:
    """Whether a point lies in a ball about any of the centers."""
    is_inside = []
    for own in blocks(points):
        is_own = torch.zeros(len(own), dtype=torch.bool)
        for others, reach in zip(blocks(centers), torch.split(radii, BLOCK_ROWS), strict=True):
            is_own |= (torch.cdist(own, others) <= reach).any(1)
        is_inside.append(is_own)
    return torch.cat(is_inside)
