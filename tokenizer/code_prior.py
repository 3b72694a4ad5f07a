"""A prior inside the tokenizer: how likely codes are, by small convolutional heads.

    p(codes) = Π_layers Π_passes Π_positions p(code | U, layers before, passes before)

U is what coarser groups say of a position. A layer is coded in a few passes, each over a fixed
share of its positions; within a pass all codes are independent given what is known, so that coding
takes a few parallel steps at any image size, and drawing, too. Contexts are hard codes without
gradient.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenizer.config import TokenizerConfig
from tokenizer.networks import ResidualBlock
from tokenizer.quantizers.base import at_least_float32
from tokenizer.topdown import TopDownGroup, TopDownPath

NUM_BLOCKS = 2

Choose = Callable[[Float[Tensor, "batch positions codes"]], Int[Tensor, "batch positions"]]
"""Codes by their log-probabilities."""


def most_likely(log_probabilities: Tensor) -> Tensor:
    """The code with the highest probability, at each position."""
    return log_probabilities.argmax(-1)


def drawn(generator: torch.Generator | None) -> Choose:
    """Draws each code by its probability."""

    def draw(log_probabilities: Tensor) -> Tensor:
        rows = log_probabilities.exp().flatten(0, 1)
        chosen = torch.multinomial(rows, 1, generator=generator)
        return chosen.view(log_probabilities.shape[:2])

    return draw


class CodeTerms(NamedTuple):
    """What a prior adds to the objective, in nats per image; means over the batch."""

    rate: Float[Tensor, ""]
    """E_P[-log p] summed over all codes, whose gradient reaches the posteriors P alone."""
    fit: Float[Tensor, ""]
    """The same number, whose gradient reaches the heads alone."""


class CodingPass(NamedTuple):
    """The codes of a layer that become known together."""

    layer: int
    """Counted over all groups."""
    codes: Int[Tensor, "batch height width"]
    """Of the layer, to be filled in at `positions` before the next pass is asked for."""
    positions: Bool[Tensor, "height width"]
    log_probabilities: Float[Tensor, "batch positions codes"]


class CodePrior(nn.Module):
    """The heads of all layers; a 1×1 convolution, residual blocks, GELU, a 1×1 convolution each."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width, self.num_passes = config.code_prior.width, config.code_prior.num_passes
        self.heads = nn.ModuleList()
        for number, group in enumerate(config.groups):
            # U, the layers before, the known codes of the layer, and which are known.
            num_inputs = (number > 0) + 2
            self.heads.append(
                nn.ModuleList(
                    _head(num_inputs * group.code_dim + 1, width, size)
                    for size in group.codebook_sizes
                )
            )

    def order(self, height: int, width: int) -> Int[Tensor, "height width"]:
        """The pass of each position, from 0: those of one pass lie far from each other."""
        side = math.isqrt(self.num_passes)
        order = torch.zeros(1, 1, dtype=torch.int64)
        while len(order) < side:  # an ordered dither
            order = torch.cat(
                [
                    torch.cat([4 * order, 4 * order + 2], 1),
                    torch.cat([4 * order + 3, 4 * order + 1], 1),
                ]
            )
        repeats = (-(-height // side), -(-width // side))
        device = next(self.parameters()).device
        return order.repeat(repeats)[:height, :width].to(device)

    def log_probabilities(
        self, top_down: TopDownPath, indices: Sequence[Int[Tensor, "batch _ _ _"]]
    ) -> list[list[Float[Tensor, "batch height width codes"]]]:
        """Of each layer of each group: log p of every code, given those that come before it."""
        results: list[list[Tensor]] = []
        for number, group, upsampled, codes in self._groups(top_down, indices):
            order = self.order(*codes.shape[2:])
            layers = []
            for layer in range(codes.shape[1]):
                context = _Context(group, layer, upsampled, codes)
                total: Tensor | None = None
                for step in range(self.num_passes):
                    found = self._log_probabilities(number, context, order < step)
                    is_now = (order == step).unsqueeze(-1)
                    total = found if total is None else torch.where(is_now, found, total)
                assert total is not None
                layers.append(total)
            results.append(layers)
        return results

    def completed(
        self,
        top_down: TopDownPath,
        indices: Sequence[Int[Tensor, "batch _ _ _"]],
        num_layers: int,
        choose: Choose,
    ) -> list[Int[Tensor, "batch _ _ _"]]:
        """The first `num_layers` layers of the codes as they are, the others chosen anew."""
        completed = [group.clone() for group in indices]
        for now in self.passes(top_down, completed, num_layers):
            now.codes[:, now.positions] = choose(now.log_probabilities)
        return completed

    def passes(
        self, top_down: TopDownPath, indices: Sequence[Int[Tensor, "batch _ _ _"]], num_layers: int
    ) -> Iterator[CodingPass]:
        """In the order of coding all passes but those of the first `num_layers` layers.

        What `indices` hold where nothing is known yet has no influence. Each pass is to be filled
        in there, in place.
        """
        first = 0
        for number, group, upsampled, codes in self._groups(top_down, indices):
            order = self.order(*codes.shape[2:])
            for layer in range(min(num_layers, codes.shape[1]), codes.shape[1]):
                for step in range(self.num_passes):
                    context, positions = _Context(group, layer, upsampled, codes), order == step
                    if not positions.any():  # of a small map
                        continue
                    rows = positions.expand(len(codes), *positions.shape).nonzero(as_tuple=True)
                    inputs = context.inputs(order < step)
                    found = self._of_rows(number, layer, inputs, rows)
                    found = found.view(len(codes), -1, found.shape[1])
                    yield CodingPass(first + layer, codes[:, layer], positions, found)
            first += codes.shape[1]
            num_layers = max(num_layers - codes.shape[1], 0)

    def terms(
        self,
        top_down: TopDownPath,
        indices: Sequence[Int[Tensor, "batch _ _ _"]],
        latents: Sequence[Float[Tensor, "batch _ _ _"]] | None,
    ) -> CodeTerms:
        """One random pass of one random layer of each group, for each image.

        Weighed so that the expectation is that of all images, layers and passes.

        Args:
            top_down: holds code vectors and upward paths.
            indices: hard codes, which are the contexts.
            latents: Ẑ of each group, for the posteriors; without them the hard codes stand alone.
        """
        rate = fit = torch.zeros((), device=indices[0].device)
        for number, group, upsampled, codes in self._groups(top_down, indices):
            batch, depth, *size = codes.shape
            weight = self.num_passes * depth / batch
            first = int(torch.randint(depth, ()))
            order = self.order(*size)
            for layer in range(depth):
                images = slice((layer + first) % depth, None, depth)
                own = codes[images]
                if not len(own):
                    continue
                passes = torch.randint(self.num_passes, (len(own), 1, 1), device=own.device)
                with torch.no_grad():
                    above = None if upsampled is None else upsampled[images]
                    inputs = _Context(group, layer, above, own).inputs(order < passes)
                rows = (order == passes).nonzero(as_tuple=True)
                features = self._features(number, layer, inputs, rows)
                last = self.heads[number][layer][-1]  # type: ignore[index]
                if latents is None or not group.quantizer.has_posterior:
                    logits = at_least_float32(last(features))
                    hard = functional.cross_entropy(logits, own[:, layer][rows], reduction="sum")
                    fit = fit + weight * hard
                    continue
                residual = at_least_float32(latents[number][images].movedim(1, -1)[rows])
                for before in range(layer):
                    codebook = at_least_float32(group.quantizer.codebook(before))
                    residual = residual - functional.embedding(own[:, before][rows], codebook)
                soft = group.quantizer.cross_entropy(layer, residual, features, last)
                rate, fit = rate + weight * soft.rate, fit + weight * soft.fit
        return CodeTerms(rate, fit)

    def _groups(
        self, top_down: TopDownPath, indices: Sequence[Tensor]
    ) -> Iterator[tuple[int, TopDownGroup, Tensor | None, Tensor]]:
        """Number, group, U, codes of each group; codes may change until the next is asked for."""
        state: Tensor | None = None
        for number, (group, codes) in enumerate(zip(top_down, indices, strict=True)):
            with torch.no_grad():
                upsampled = group.upsampled(state)
            yield number, group, upsampled, codes
            with torch.no_grad():
                quantized = group.quantized(codes)
                state = quantized if upsampled is None else upsampled + quantized

    def _log_probabilities(self, number: int, context: "_Context", known: Tensor) -> Tensor:
        codes = context.codes[:, 0]
        every = torch.ones_like(codes, dtype=torch.bool).nonzero(as_tuple=True)
        rows = self._of_rows(number, context.layer, context.inputs(known), every)
        return rows.view(*codes.shape, -1)

    def _of_rows(
        self, number: int, layer: int, inputs: Tensor, rows: tuple[Tensor, ...]
    ) -> Float[Tensor, "rows codes"]:
        last = self.heads[number][layer][-1]  # type: ignore[index]
        features = self._features(number, layer, inputs, rows)
        return at_least_float32(last(features)).log_softmax(1)

    def _features(
        self, number: int, layer: int, inputs: Tensor, rows: tuple[Tensor, ...]
    ) -> Float[Tensor, "rows channels"]:
        """What the wide last layer of a head sees at the positions (image, y, x) alone."""
        *trunk, activation, last = self.heads[number][layer]  # type: ignore[index]
        # 1×1 convolutions are faster so, and so is the choice of positions.
        features = inputs.to(last.weight.dtype, memory_format=torch.channels_last)
        for module in trunk:
            features = module(features)
        chosen: Tensor = activation(features.movedim(1, -1)[rows])
        return chosen


class _Context(NamedTuple):
    """What the codes of one layer are conditioned on."""

    group: TopDownGroup
    layer: int
    upsampled: Tensor | None
    codes: Tensor
    """(B, depth, h, w) of the group; from `layer` on, only known positions are looked at."""

    def inputs(
        self, known: Bool[Tensor, "*batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Of a head."""
        before = self.group.quantized(self.codes, self.layer)
        codebook = at_least_float32(self.group.quantizer.codebook(self.layer))
        own = codebook[self.codes[:, self.layer]].movedim(-1, 1)
        is_known = known.expand(len(own), *own.shape[2:]).unsqueeze(1).to(own.dtype)
        parts = [before, own * is_known, is_known]
        return torch.cat(parts if self.upsampled is None else [self.upsampled, *parts], 1)


def _head(num_inputs: int, width: int, codebook_size: int) -> nn.Sequential:
    """Starts from equal probabilities."""
    last = nn.Linear(width, codebook_size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    blocks = [ResidualBlock(width, 1 / math.sqrt(NUM_BLOCKS)) for _ in range(NUM_BLOCKS)]
    return nn.Sequential(nn.Conv2d(num_inputs, width, 1), *blocks, nn.GELU(), last)
