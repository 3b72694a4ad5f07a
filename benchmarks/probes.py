"""How well features tell classes: a linear probe in closed form, nearest neighbors, PCA."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import one_hot

PENALTIES = (0.003, 0.03, 0.3, 3.0, 30.0)
"""Ridge penalties per image and standardized feature."""
NEIGHBORS = (1, 5, 20, 50)
HELD_OUT = 5
"""One image in so many chooses between them; the last of the training images."""


class Probes(NamedTuple):
    """Accuracies on test images, and what was chosen on images held out from training."""

    dim: int
    linear: float
    penalty: float
    neighbors: float
    num_neighbors: int


class Labeled(NamedTuple):
    """Features with classes."""

    features: Float[Tensor, "images dim"]
    labels: Int64[Tensor, " images"]

    def part(self, start: int, stop: int) -> "Labeled":
        """Some of the images."""
        return Labeled(self.features[start:stop], self.labels[start:stop])


def probe(train: Labeled, test: Labeled) -> Probes:
    """Both probes on features that are standardized by the training images."""
    mean, deviation = train.features.mean(0), train.features.std(0)
    keeps = deviation > 1e-6 * deviation.max()  # a code that never occurs tells nothing
    train, test = (
        Labeled((own.features[:, keeps] - mean[keeps]) / deviation[keeps], own.labels)
        for own in (train, test)
    )
    count = len(train.labels)
    num_fitted = count - count // HELD_OUT
    fitted, held_out = train.part(0, num_fitted), train.part(num_fitted, count)
    linear = ridge_accuracies(fitted, held_out, PENALTIES)
    penalty = max(PENALTIES, key=lambda own: linear[PENALTIES.index(own)])
    neighbors = neighbor_accuracies(fitted, held_out, NEIGHBORS)
    num_neighbors = max(NEIGHBORS, key=lambda own: neighbors[NEIGHBORS.index(own)])
    (linear_accuracy,) = ridge_accuracies(train, test, [penalty])
    (neighbor_accuracy,) = neighbor_accuracies(train, test, [num_neighbors])
    dim = train.features.shape[1]
    return Probes(dim, linear_accuracy, penalty, neighbor_accuracy, num_neighbors)


def ridge_accuracies(train: Labeled, test: Labeled, penalties: Sequence[float]) -> list[float]:
    """Accuracy on `test` of least squares to the classes (one-hot), of each penalty.

    W = (XᵀX + λ N I)⁻¹ Xᵀ Y, with centered features and classes; the class is that of the largest
    output.
    """
    targets = one_hot(train.labels).to(train.features)
    feature_mean, target_mean = train.features.mean(0), targets.mean(0)
    centered = train.features - feature_mean
    products, answers = centered.T @ centered, centered.T @ (targets - target_mean)
    accuracies = []
    for penalty in penalties:
        ridge = penalty * len(centered) * torch.eye(len(products), dtype=products.dtype)
        weights = torch.cholesky_solve(answers, torch.linalg.cholesky(products + ridge))
        outputs = (test.features - feature_mean) @ weights + target_mean
        accuracies.append(_accuracy(outputs, test.labels))
    return accuracies


def neighbor_accuracies(train: Labeled, test: Labeled, numbers: Sequence[int]) -> list[float]:
    """Accuracy of the most frequent class among the nearest, of each number of neighbors.

    Euclidean distance; of equally frequent classes the one with the lowest number.
    """
    found = torch.cat(
        [
            torch.cdist(part, train.features).topk(max(numbers), 1, largest=False).indices
            for part in torch.split(test.features, 500)
        ]
    )
    votes = one_hot(train.labels)[found]  # (tests, neighbors, classes)
    return [_accuracy(votes[:, :number].sum(1), test.labels) for number in numbers]


def neighbor_distances(
    train: Float[Tensor, "images dim"], test: Float[Tensor, "others dim"], number: int
) -> Float64[Tensor, " others"]:
    """Distance of each of `test` to the nearest but `number` - 1 of `train`.

    Features are standardized by `train`, then scaled to length 1.
    """
    mean, deviation = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (
        torch.nn.functional.normalize((own - mean) / deviation, dim=1) for own in (train, test)
    )
    return torch.cdist(test, train).topk(number, 1, largest=False).values[:, -1].double()


def _accuracy(scores: Tensor, labels: Int64[Tensor, " images"]) -> float:
    return (scores.argmax(1) == labels).double().mean().item()


def principal_components(
    train: Float[Tensor, "images dim"], test: Float[Tensor, "images dim"], count: int
) -> tuple[Float[Tensor, "images count"], Float[Tensor, "images count"]]:
    """Both sets in the directions of largest variance of the first."""
    mean = train.mean(0)
    covariance = (train - mean).T @ (train - mean) / (len(train) - 1)
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -count:]  # ascending
    return (train - mean) @ directions, (test - mean) @ directions
