"""How unusual images are to a run: bits of their codes, a bound of their likelihood, scores."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from torch.nn import functional

from pipelines.images import to_float, to_pil
from prior import Prior
from tokenizer import Tokenizer
from tokenizer.objective import MIN_VARIANCE, discretized_code_length
from tokenizer.storage.errors import InputError

BATCH = 50
"""Images at a time."""
SMALLEST_DEVIATION = 1e-3
"""Of a statistic, in bits or in logarithms: rounding must not make an image unusual."""
RIDGE = 1e-3
"""Added to the variances of standardized statistics, for those that follow from each other."""
Images = UInt8[Tensor, "images channels height width"]

SCORES = {
    "reconstruction_error": "root mean squared error of the reconstruction, on [0, 1]",
    "code_bits": "bits of all codes under the prior",
    "likelihood": "bound of -log2 p(image), in bits per dimension",
    "typicality": "distance of that bound from its mean over the reference images",
    "complexity": "that bound minus the bits per dimension of the image's PNG",
    "joint": "how far bits of each layer, error, bound and size of the PNG are together from those "
    "of the reference images",
}
"""What each score is; the higher, the less does an image look like the run's own."""


class Measurements(NamedTuple):
    """Of images, before any is called unusual; on the CPU."""

    bits: dict[str, Float64[Tensor, "images layers"]]
    """Of the codes of each layer, coarse to fine, under "prior" and "own" prior."""
    bits_per_dim: Float64[Tensor, " images"]
    """Bound of the 8-bit image's -log2 p, from hard codes under the first of these."""
    rmse: Float64[Tensor, " images"]
    """Of the reconstruction, on [0, 1]."""
    png_bits_per_dim: Float64[Tensor, " images"]
    """Size of the image as PNG."""

    def statistics(self) -> Float64[Tensor, "images statistics"]:
        """What the joint score looks at."""
        others = [self.bits_per_dim, self.rmse.clamp_min(1e-6).log(), self.png_bits_per_dim]
        return torch.cat([*self.bits.values(), torch.stack(others, 1)], 1)


class AnomalyScorer:
    """Scores by a tokenizer, its own prior and the prior of stage two, or one of these.

    Args:
        tokenizer: in evaluation mode.
        prior: over its codes; None: there is none. Its null condition is taken.
        reference: images that count as usual, which training has not seen; at least two.

    Raises:
        InputError: there is no prior, none without a condition, or too few images.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior | None, reference: Images) -> None:
        check_priors(tokenizer, prior)
        if len(reference) < 2:
            raise InputError(f"there must be at least 2 reference images, got {len(reference)}")
        self.tokenizer, self.prior = tokenizer, prior
        errors = torch.cat([self._squared_errors(part) for part in torch.split(reference, BATCH)])
        self.decoder_variance = max(errors.mean().item(), MIN_VARIANCE)
        """σ² of the bound's decoder, on [-1, 1]: the mean squared error of the reference."""
        self.reference = self.measure(reference)
        statistics = self.reference.statistics()
        self._mean, self._deviation = (
            statistics.mean(0),
            statistics.std(0).clamp_min(SMALLEST_DEVIATION),
        )
        standard = (statistics - self._mean) / self._deviation
        covariance = standard.T @ standard / (len(standard) - 1)
        identity = torch.eye(len(covariance), dtype=torch.float64)
        self._precision = torch.linalg.inv(covariance + RIDGE * identity)

    def measure(self, images: Images) -> Measurements:
        """What is measured of any number of images."""
        rows: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        for part in torch.split(images, BATCH):
            batch = to_float(part).to(self._device)
            indices = self.tokenizer.encode(batch)
            decoded = self.tokenizer.decode(indices)
            bits = {
                name: torch.cat([own.sum((2, 3)) for own in groups], 1)
                for name, groups in self._code_bits(indices).items()
            }
            nats = discretized_code_length(batch, decoded, self.decoder_variance)
            total = nats / math.log(2) + next(iter(bits.values())).sum(1)
            errors = (batch - decoded).double().square().flatten(1).mean(1)
            rows.append((bits, total / batch[0].numel(), errors.sqrt() / 2))
        return Measurements(
            {name: torch.cat([row[0][name] for row in rows]).cpu() for name in rows[0][0]},
            torch.cat([row[1] for row in rows]).cpu(),
            torch.cat([row[2] for row in rows]).cpu(),
            png_bits_per_dim(images),
        )

    def scores(self, measured: Measurements) -> dict[str, Float64[Tensor, " images"]]:
        """By the names of `SCORES`.

        Typicality is the one-image case of arXiv 1906.02994, complexity that of arXiv 1909.11480;
        joint is the Mahalanobis distance to the reference, a Gaussian case of density of states
        estimation (arXiv 2006.09273).
        """
        standard = (measured.statistics() - self._mean) / self._deviation
        distances = torch.einsum("ni,ij,nj->n", standard, self._precision, standard)
        bound = measured.bits_per_dim
        return {
            "reconstruction_error": measured.rmse,
            "code_bits": next(iter(measured.bits.values())).sum(1),
            "likelihood": bound,
            "typicality": (bound - self.reference.bits_per_dim.mean()).abs(),
            "complexity": bound - measured.png_bits_per_dim,
            "joint": distances.clamp_min(0).sqrt(),
        }

    def surprise(self, images: Images) -> Float[Tensor, "images height width"]:
        """Bits of the codes above each pixel, per pixel, under the first prior."""
        maps = []
        for part in torch.split(images, BATCH):
            groups = next(iter(self._code_bits(self._encode(part)).values()))
            total = torch.zeros(len(part), *part.shape[2:], dtype=torch.float64)
            for own in groups:
                of_position = own.sum(1, keepdim=True).cpu()
                cell = part.shape[2] * part.shape[3] / of_position[0].numel()
                enlarged = functional.interpolate(of_position, part.shape[2:], mode="nearest")
                total += enlarged[:, 0] / cell
            maps.append(total.float())
        return torch.cat(maps)

    @property
    def _device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    def _encode(self, images: Images) -> list[Tensor]:
        return self.tokenizer.encode(to_float(images).to(self._device))

    def _squared_errors(self, images: Images) -> Tensor:
        batch = to_float(images).to(self._device)
        decoded = self.tokenizer.decode(self.tokenizer.encode(batch))
        return (batch - decoded).double().square().flatten(1).mean(1).cpu()

    @torch.no_grad()
    def _code_bits(self, indices: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """-log2 p of each code, (B, depth, h, w) of each group, by prior."""
        found = {}
        if self.prior is not None:
            logits = self.prior.logits(indices, self.prior.null_condition(len(indices[0])))
            found["prior"] = _bits(logits, indices)
        if self.tokenizer.code_prior is not None:
            found["own"] = _bits(self.tokenizer.log_probabilities(indices), indices)
        return found


def check_priors(tokenizer: Tokenizer, prior: Prior | None) -> None:
    """Whether something says how likely codes are.

    Raises:
        InputError: nothing does, or the prior knows conditional probabilities alone.
    """
    if prior is None and tokenizer.code_prior is None:
        raise InputError(
            "run_dir must hold a prior, or a tokenizer with a prior of its own: there is neither"
        )
    if prior is not None and not prior.conditioner.has_null:
        raise InputError(
            "run_dir must hold a prior with a null condition, as it is trained by label_dropout"
        )


def png_bits_per_dim(images: Images) -> Float64[Tensor, " images"]:
    """Size of each image as PNG (Pillow's settings), which stands for its complexity."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "PNG")
        sizes.append(8 * buffer.tell() / image.numel())
    return torch.tensor(sizes, dtype=torch.float64)


def auroc(usual: Float64[Tensor, " m"], unusual: Float64[Tensor, " n"]) -> float:
    """Chance that an unusual image scores higher than a usual one; a tie counts half."""
    values = torch.cat([usual, unusual])
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # means of equal values, from 1
    total = float(ranks[len(usual) :].double().sum()) - len(unusual) * (len(unusual) + 1) / 2
    return total / (len(usual) * len(unusual))


def shares_above(
    scores: Mapping[str, Tensor], reference: Mapping[str, Tensor], quantile: float
) -> dict[str, float]:
    """Share of images whose score lies above this quantile of the reference, by score."""
    return {
        name: (values > reference[name].quantile(quantile)).double().mean().item()
        for name, values in scores.items()
    }


def _bits(logits: Sequence[Sequence[Tensor]], indices: Sequence[Tensor]) -> list[Tensor]:
    groups = []
    for layers, group in zip(logits, indices, strict=True):
        chosen = group.to(layers[0].device).unbind(1)
        own = [
            layer.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1).double()
            for layer, codes in zip(layers, chosen, strict=True)
        ]
        groups.append(torch.stack(own, 1) / -math.log(2))
    return groups
