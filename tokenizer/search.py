"""Codes chosen by what the real decoder draws from them and by what they cost.

Encoders are greedy: each layer takes the code nearest to its latent, whatever the decoder makes of
it. The search goes on from there and lowers, for each image,

    ‖x - x̂‖² / 2σ² + μ · (-log p(codes))

where σ² is `decoder_variance` and μ `rate_weight`. Group by group, coarse to fine, and position by
position it takes the best of a few candidates: the stacks of codes nearest to the vector at which a
quadratic model of the error, from the decoder's gradient, has its minimum.

Positions so far apart that their changes do not meet in the image are tried at once, so that the
number of decoded images does not grow with the image's size. What is taken is decoded together once
more, and of an image that got no better half of the changes, then a quarter and so on: no step
makes an image worse. Codes of finer layers are kept when a coarse one changes: what encoders would
choose anew there would undo what the search has chosen, and reach further. The finer groups, which
come next, answer to it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from tokenizer.objective import MIN_VARIANCE
from tokenizer.quantizers.base import at_least_float32
from tokenizer.search_config import SearchConfig
from tokenizer.sensitivity import Decoding, Sensitivity, measure_sensitivities, squared_error_cells
from tokenizer.stacks import nearest_stacks
from tokenizer.storage.errors import InputError

PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Of images decoded together."""
LEAST_GAIN = 1e-6
"""Share of the objective: less would be rounding."""


@runtime_checkable
class CodeCosts(Protocol):
    """Anything that knows how likely codes are."""

    def log_probabilities(
        self, indices: Sequence[Int[Tensor, "batch _ _ _"]]
    ) -> list[list[Float[Tensor, "batch height width codes"]]]:
        """Of each layer of each group: log p of every code, given those that come before it.

        Added up over the given codes they are log p of all.
        """


def check_costs(config: SearchConfig, costs: CodeCosts | None) -> None:
    """Checks that what is to be counted can be.

    Raises:
        InputError: code lengths count for something and nothing gives them, or the reverse.
    """
    if config.rate_weight > 0 and costs is None:
        raise InputError(
            f"search.rate_weight must be 0 without costs of codes, got {config.rate_weight}"
        )
    if config.rate_weight == 0 and costs is not None:
        raise InputError("search.rate_weight must be > 0 with costs of codes, got 0")


def search_codes(
    decoding: Decoding,
    images: Float[Tensor, "batch channels height width"],
    indices: Sequence[Int[Tensor, "batch _ _ _"]],
    config: SearchConfig,
    costs: CodeCosts | None = None,
) -> list[Int[Tensor, "batch _ _ _"]]:
    """Codes of no higher cost than `indices`, whichever images are searched together.

    Args:
        decoding: the way from codes to images.
        images: on [-1, 1].
        indices: the encoder's codes, coarse to fine.
        config: what is tried.
        costs: of the codes; None counts errors alone.
    """
    if not config.is_on:
        return list(indices)
    # Gradients are needed, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        images, *indices = (tensor.clone() for tensor in (images, *indices))
        sensitivities = measure_sensitivities(decoding)
        at_once = PIXELS_AT_ONCE.get(images.device.type, PIXELS_AT_ONCE["cpu"])
        step = max(1, at_once // (config.candidates * images[0, 0].numel()))
        parts = [
            _Search(
                decoding,
                sensitivities,
                config,
                costs,
                images[start : start + step],
                [group[start : start + step] for group in indices],
            ).run()
            for start in range(0, len(images), step)
        ]
    return [torch.cat(group) for group in zip(*parts, strict=True)]


class _Search:
    """The search of some images; their codes are in `indices` and change in place."""

    def __init__(
        self,
        decoding: Decoding,
        sensitivities: Sequence[Sensitivity],
        config: SearchConfig,
        costs: CodeCosts | None,
        images: Tensor,
        indices: Sequence[Tensor],
    ) -> None:
        self.decoding = decoding
        self.groups = list(decoding.top_down)
        self.sensitivities = sensitivities
        self.config = config
        self.costs = costs
        self.images = images
        self.indices = [group.clone() for group in indices]
        self.quantized = [
            group.quantized(own) for group, own in zip(self.groups, indices, strict=True)
        ]
        errors = (images - decoding.images(self.quantized, None)).double().square()
        variance = errors.flatten(1).mean(1)  # (B,)
        if config.decoder_variance is not None:
            variance = torch.full_like(variance, config.decoder_variance)
        self.precision = 1 / variance.clamp_min(MIN_VARIANCE)
        self.rows = torch.arange(len(images), device=images.device)
        cells = self._cells(0, self.rows, self.indices[0], self.quantized[0], None)
        self.objective = cells.sum((1, 2))  # (B,)

    def run(self) -> list[Tensor]:
        """The codes after all sweeps."""
        start = self.objective.clone()
        for _ in range(self.config.sweeps):
            for number in range(len(self.groups)):
                self._sweep(number)
        assert (self.objective <= start).all()
        return self.indices

    def _sweep(self, number: int) -> None:
        """Visits every position of one group."""
        group = self.groups[number]
        states = self.decoding.top_down.states(self.quantized)
        upsampled = group.upsampled(states[number - 1] if number else None)
        candidates = self._candidates(number, upsampled)  # (B, candidates, depth, h, w)
        vectors = group.quantized(candidates.flatten(0, 1))
        vectors = vectors.view(*candidates.shape[:2], *vectors.shape[1:])
        reach = self.sensitivities[number].reach
        for mask in _masks(self.indices[number], reach):
            self._visit(number, upsampled, candidates, vectors, mask)

    def _visit(
        self,
        number: int,
        upsampled: Tensor | None,
        candidates: Tensor,
        vectors: Tensor,
        mask: Tensor,
    ) -> None:
        """Takes the best candidate of each position of the mask, as far as images get better."""
        count = candidates.shape[1]
        cells = self._cells(
            number,
            self.rows.repeat_interleave(count),
            torch.where(mask, candidates, self.indices[number].unsqueeze(1)).flatten(0, 1),
            torch.where(mask, vectors, self.quantized[number].unsqueeze(1)).flatten(0, 1),
            upsampled,
        )
        around = _sums_around(cells, self.sensitivities[number].reach)
        around = around.view(-1, count, *mask.shape)
        lowest, best = around.min(1)  # (B, h, w)
        gains = torch.where(mask, around[:, 0] - lowest, 0).flatten(1)
        rank = gains.argsort(dim=1, descending=True, stable=True).argsort(1).view_as(best)
        chosen = best[:, None, None]
        indices = candidates.take_along_dim(chosen, 1).squeeze(1)
        quantized = vectors.take_along_dim(chosen, 1).squeeze(1)
        num_changes = (gains > 0).sum(1)
        while len(rows := num_changes.nonzero().squeeze(1)):
            changes = (rank[rows] < num_changes[rows, None, None]).unsqueeze(1)
            new_indices = torch.where(changes, indices[rows], self.indices[number][rows])
            new_quantized = torch.where(changes, quantized[rows], self.quantized[number][rows])
            objective = self._cells(number, rows, new_indices, new_quantized, upsampled)
            objective = objective.sum((1, 2))
            least = LEAST_GAIN * self.objective[rows].abs()
            is_better = objective < self.objective[rows] - least
            taken = rows[is_better]
            self.indices[number][taken] = new_indices[is_better]
            self.quantized[number][taken] = new_quantized[is_better]
            self.objective[taken] = objective[is_better]
            num_changes[rows] = torch.where(is_better, 0, num_changes[rows] // 2)

    def _candidates(
        self, number: int, upsampled: Tensor | None
    ) -> Int[Tensor, "batch candidates depth height width"]:
        """The present stack of each position first, then those nearest to the model's minimum."""
        factor, quantizer = self.sensitivities[number].factor, self.groups[number].quantizer
        targets = self._targets(number, upsampled).movedim(1, -1)  # (B, h, w, D)
        lengths = None
        if self.costs is not None:
            weight = self.config.rate_weight
            log_probabilities = self.costs.log_probabilities(self.indices)[number]
            lengths = [-weight * layer.to(targets).flatten(0, 2) for layer in log_probabilities]
        precisions = self.precision.to(targets).view(-1, 1, 1).expand(targets.shape[:3])
        stacks = nearest_stacks(
            targets.flatten(0, 2) @ factor,
            [
                at_least_float32(quantizer.codebook(layer)) @ factor
                for layer in range(quantizer.num_layers)
            ],
            precisions.flatten(),
            lengths,
            self.config.candidates - 1,
            self.config.beam,
        )
        others = stacks.view(*targets.shape[:3], *stacks.shape[1:]).permute(0, 3, 4, 1, 2)
        return torch.cat([self.indices[number].unsqueeze(1), others], 1)

    def _targets(self, number: int, upsampled: Tensor | None) -> Tensor:
        """Where each vector alone would lower the error most: z - (JᵀJ)⁻¹ ∂(‖x - x̂‖² / 2)/∂z."""
        vectors, *later = self.quantized[number:]
        vectors = vectors.clone().requires_grad_()
        with torch.enable_grad():
            images = self.decoding.images([vectors, *later], upsampled)
            error = (images - self.images).square().sum() / 2
        (gradient,) = torch.autograd.grad(error, vectors)
        columns = gradient.movedim(1, 0).flatten(1)  # (D, N)
        steps = torch.cholesky_solve(columns, self.sensitivities[number].factor)
        steps = steps.view(-1, *gradient.movedim(1, 0).shape[1:]).movedim(0, 1)
        return vectors.detach() - steps

    def _cells(
        self,
        number: int,
        rows: Int[Tensor, " trials"],
        indices: Int[Tensor, "trials depth height width"],
        quantized: Float[Tensor, "trials dim height width"],
        upsampled: Tensor | None,
    ) -> Float64[Tensor, "trials height width"]:
        """The objective of images `rows` with other codes of one group, by its positions."""
        images = self.images[rows]
        later = [group[rows] for group in self.quantized[number + 1 :]]
        drawn = self.decoding.images(
            [quantized, *later], None if upsampled is None else upsampled[rows]
        )
        downsampling = self.decoding.configs[number].downsampling
        cells = squared_error_cells(images - drawn, downsampling).double()
        cells = cells * (self.precision[rows] / 2).view(-1, 1, 1)
        if self.costs is None:
            return cells
        whole = [group[rows] for group in self.indices]
        whole[number] = indices
        log_probabilities = self.costs.log_probabilities(whole)
        for group, layers in zip(whole, log_probabilities, strict=True):
            for layer, own in zip(layers, group.unbind(1), strict=True):
                length = -layer.gather(-1, own.unsqueeze(-1)).squeeze(-1).double()
                cells = cells + self.config.rate_weight * _resampled(length, *cells.shape[1:])
        return cells


def _masks(indices: Tensor, reach: int | None) -> Iterator[Bool[Tensor, "height width"]]:
    """Sets of positions that are tried at once; each position is in one of them."""
    height, width = indices.shape[2:]
    step = max(height, width) if reach is None else 2 * reach + 1
    for row, column in itertools.product(range(min(step, height)), range(min(step, width))):
        mask = torch.zeros(height, width, dtype=torch.bool, device=indices.device)
        mask[row::step, column::step] = True
        yield mask


def _sums_around(cells: Tensor, reach: int | None) -> Tensor:
    """For each position the sum of the cells that it reaches."""
    if reach is None:
        return cells.sum((1, 2), keepdim=True).expand_as(cells)
    side = 2 * reach + 1
    return functional.avg_pool2d(cells.unsqueeze(1), side, 1, reach)[:, 0] * side**2


def _resampled(cells: Tensor, height: int, width: int) -> Tensor:
    """Sums of a finer map, or equal shares of a coarser one's."""
    if cells.shape[1] >= height:
        factor = cells.shape[1] // height
        return functional.avg_pool2d(cells.unsqueeze(1), factor)[:, 0] * factor**2
    factor = height // cells.shape[1]
    shares = cells / factor**2
    return shares.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
