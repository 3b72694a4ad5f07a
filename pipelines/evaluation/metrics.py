"""Distances between sets of images, errors of reconstructions, use of the codes.

Arrays in, numbers out: sharing the work over processes is the caller's business. Distances are
those of torch-fidelity, in float64.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from pipelines.evaluation.feature_shares import Features
from pipelines.evaluation.rows import Rows
from pipelines.evaluation.similarity import SSIM_WINDOW, structural_similarity
from pipelines.evaluation.streaming import (
    Statistics,
    fit_gaussian,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError

IS_SPLITS = 10
KID_SUBSET_SIZE = 1000
KID_SUBSETS = 100
NUM_NEIGHBORS = 3
# A split of the Inception Score with one image scores 1 whatever it shows.
MIN_IMAGES = 2 * IS_SPLITS


def metric_name(
    metric: Literal["FD", "rFD", "IS", "KID", "precision", "recall"], extractor_name: str
) -> str:
    """Name to report: "FID" and "rFID" for Inception, "FD-MobileNetV2" and so on for the rest.

    "FD" is of generated images, "rFD" of reconstructions.
    """
    if extractor_name == "Inception":
        return metric.replace("FD", "FID")
    return f"{metric}-{extractor_name}"


def check_num_images(num_images: int, num_reference_images: int) -> None:
    """Says before any image is drawn whether `generation_metrics` can be computed.

    Raises:
        InputError: too few images on a side.
    """
    numbers = {"num_images": num_images, "number of reference images": num_reference_images}
    for name, number in numbers.items():
        if number < MIN_IMAGES:
            raise InputError(f"{name} must be >= {MIN_IMAGES} for IS and KID, got {number}")


def metric_settings(num_images: int, num_reference_images: int | None, seed: int) -> dict[str, int]:
    """What `generation_metrics` uses at these sizes, for the protocol; None for statistics.

    With fewer than 1,000 images on a side, KID's subsets hold all of the smaller side.
    """
    settings = {"IS_splits": IS_SPLITS, "metric_seed": seed}
    if num_reference_images is not None:
        settings["KID_subset_size"] = min(KID_SUBSET_SIZE, num_images, num_reference_images)
        settings["KID_subsets"] = KID_SUBSETS
        settings["precision_recall_neighbors"] = NUM_NEIGHBORS
    return settings


def generation_metrics(
    generated: Features,
    reference: Features | Statistics,
    extractor_name: str,
    seed: int,
    known: Statistics | None = None,
) -> dict[str, float]:
    """FID, IS, KID, precision and recall, under the names that `metric_name` gives.

    Saved statistics as reference give FID and IS alone.

    Sources: FID arXiv 1706.08500, IS arXiv 1606.03498, KID arXiv 1801.01401, precision and recall
    arXiv 1904.06991. IS is of the generated images alone. KID is unbiased, so it may be below 0.
    FID is biased upward by about 1/number of images: compare equal numbers only.

    Args:
        generated: features of the images that are measured.
        reference: features of real images, or their statistics.
        extractor_name: of the features.
        seed: of splits and subsets.
        known: statistics of the features of `reference`; None: they are computed.

    Raises:
        InputError: too few images on a side.
    """
    ours = generated.features
    theirs = reference if isinstance(reference, Statistics) else reference.features
    num_images = len(ours)
    num_reference_images = num_images if isinstance(theirs, Statistics) else len(theirs)
    check_num_images(num_images, num_reference_images)
    values = {
        metric_name("FD", extractor_name): frechet_distance(ours, known or theirs),
        metric_name("IS", extractor_name): inception_score(generated.logits, IS_SPLITS, seed),
    }
    if isinstance(theirs, Statistics):
        return values
    settings = metric_settings(num_images, num_reference_images, seed)
    subsets = (settings["KID_subsets"], settings["KID_subset_size"])
    precision, recall = precision_and_recall(ours, theirs, NUM_NEIGHBORS)
    return values | {
        metric_name("KID", extractor_name): kernel_distance(ours, theirs, *subsets, seed),
        metric_name("precision", extractor_name): precision,
        metric_name("recall", extractor_name): recall,
    }


def frechet_distance(features: Rows | Statistics, reference: Rows | Statistics) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets (arXiv 1706.08500).

    Between two halves of real data it is the floor: the best that a model can be expected to
    reach at that number of images.

    Raises:
        InputError: a side has fewer than two images.
    """
    fitted = (
        own if isinstance(own, Statistics) else fit_gaussian(own) for own in (features, reference)
    )
    sides = ({"mu": own.mean, "sigma": own.covariance} for own in fitted)
    return float(fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])


class ImageErrors(NamedTuple):
    """Errors of reconstructions, one value per image; intensities on [0, 1]."""

    rmse: Float64[Tensor, " batch"]
    """Root of the mean squared error over all values of the image."""
    psnr: Float64[Tensor, " batch"]
    """-20 log10(rmse) in dB; infinite where the reconstruction is exact."""
    ssim: Float64[Tensor, " batch"]
    """Structural similarity, mean over channels and over the positions where its window fits."""


def image_errors(
    reference: UInt8[Tensor, "batch channels height width"],
    reconstruction: UInt8[Tensor, "batch channels height width"],
) -> ImageErrors:
    """RMSE, PSNR and SSIM of each image, after rounding to 8 bits; alpha is a channel as others.

    Raises:
        InputError: the images are smaller than the window of SSIM.
    """
    if min(reference.shape[-2:]) < SSIM_WINDOW:
        raise InputError(
            f"image_size must be >= {SSIM_WINDOW} for SSIM, got {min(reference.shape[-2:])}"
        )
    difference = reference.double() - reconstruction.double()
    rmse = difference.square().mean(dim=(1, 2, 3)).sqrt() / 255
    ssim = structural_similarity(reference, reconstruction)
    return ImageErrors(rmse, -20 * rmse.log10(), ssim)


def reconstruction_metrics(errors: ImageErrors) -> dict[str, float]:
    """Summary of the errors of a whole set.

    RMSE is the root of the mean squared error over all values of the set. PSNR is the mean of the
    per-image PSNRs over the images that are not exact, whose number stands beside it (infinite if
    all are); the PSNR of the set's mean squared error is -20 log10(RMSE). SSIM is the mean.
    """
    is_exact = errors.rmse == 0
    return {
        "RMSE": errors.rmse.square().mean().sqrt().item(),
        "PSNR": math.inf if is_exact.all() else errors.psnr[~is_exact].mean().item(),
        "SSIM": errors.ssim.mean().item(),
        "num_exact_images": int(is_exact.sum()),
    }


def entropy(counts: Int64[Tensor, " codes"]) -> float:
    """Nats per code of the empirical distribution with these counts."""
    total = counts.sum()
    assert total > 0, "no code was counted"
    shares = counts[counts > 0].double() / total
    # max: a single code gives -0.0.
    return max(0.0, -(shares * shares.log()).sum().item())


def perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """exp(entropy) of the empirical distribution: 1 for a single code, K for uniform use.

    Only counts over a whole evaluation set make sense: averages over batches are biased.
    """
    return math.exp(entropy(counts))


class CodeUsage:
    """Counts how often each code of each layer is used, over a whole evaluation set.

    `counts` holds one (K,) tensor per layer, coarse to fine. With several processes sum them
    before reading any number: `usage.counts = accelerator.reduce(usage.counts, "sum")`.
    """

    own_prior_bits: list[float] | None = None
    """Bits per image of each layer under the tokenizer's own prior; None where it has none."""

    def __init__(
        self, code_maps: Sequence[CodeMapConfig], device: torch.device | str = "cpu"
    ) -> None:
        self._depths = [code_map.depth for code_map in code_maps]
        self._positions = [
            code_map.height * code_map.width
            for code_map in code_maps
            for _ in range(code_map.depth)
        ]
        self.counts: list[Tensor] = [
            torch.zeros(size, dtype=torch.int64, device=device)
            for code_map in code_maps
            for size in code_map.codebook_sizes
        ]

    def update(self, indices: Sequence[Int64[Tensor, "batch _ _ _"]]) -> None:
        """Counts hard indices: one (B, depth, h, w) tensor per group, coarse to fine."""
        assert [group.shape[1] for group in indices] == self._depths
        layers = [layer for group in indices for layer in group.unbind(dim=1)]
        for counts, layer in zip(self.counts, layers, strict=True):
            batch = torch.bincount(layer.flatten(), minlength=len(counts))
            assert len(batch) == len(counts), "an index lies outside its codebook"
            counts += batch.to(counts.device)

    def perplexity(self) -> list[float]:
        """Perplexity of each layer, in [1, K]."""
        return [perplexity(counts) for counts in self.counts]

    def usage(self) -> list[float]:
        """Share of each layer's codes that occurred at all."""
        return [(counts > 0).double().mean().item() for counts in self.counts]

    def marginal_bits(self) -> list[float]:
        """Bits per image of each layer under an ideal entropy code for its marginal counts."""
        return [
            positions * entropy(counts) / math.log(2)
            for positions, counts in zip(self._positions, self.counts, strict=True)
        ]

    def nominal_bits(self) -> list[float]:
        """Bits per image of each layer at log2(K) per code."""
        return [
            positions * math.log2(len(counts))
            for positions, counts in zip(self._positions, self.counts, strict=True)
        ]
