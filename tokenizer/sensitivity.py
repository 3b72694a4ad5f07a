"""What a change of one code vector does to the image: how far it reaches, and how strong it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tokenizer.config import GroupConfig
from tokenizer.topdown import TopDownPath

SHARE_WITHIN_REACH = 0.99
"""Of the squared change of the image."""
COARSEST_SIDE, NUM_MAPS, NUM_PROBES = 9, 4, 4
"""Random code maps that are measured on, and random directions in the space of their images."""
DAMPING = 1e-3
"""Added to JᵀJ, in units of its mean eigenvalue: some directions move no pixel."""


class Decoding(NamedTuple):
    """The way from code vectors to images, which begins at any group."""

    top_down: TopDownPath
    to_images: Callable[[Tensor], Tensor]
    """From the state y after the last group."""
    configs: Sequence[GroupConfig]
    """Of the groups, coarse to fine."""

    def images(
        self, quantized: Sequence[Tensor], upsampled: Tensor | None
    ) -> Float[Tensor, "batch channels height width"]:
        """Images from the last groups, given what the groups before say of the first of them."""
        return self.to_images(self.top_down.states(quantized, upsampled)[-1])


class Sensitivity(NamedTuple):
    """Of a group."""

    reach: int | None
    """Positions on each side of one within which nearly all of its influence lies; None: it has no
    such bound, as with attention in the decoder."""
    factor: Float[Tensor, "dim dim"]
    """L with LLᵀ = mean of JᵀJ, J = ∂ image / ∂ code vector of one position: the squared change of
    the image is about ‖change of the vector · L‖²."""


def squared_error_cells(
    errors: Float[Tensor, "batch channels height width"], downsampling: int
) -> Float[Tensor, "batch rows columns"]:
    """Squares summed over channels and over the pixels of each position of a map."""
    squares = errors.square().sum(1, keepdim=True)
    return functional.avg_pool2d(squares, downsampling)[:, 0] * downsampling**2


def measure_sensitivities(decoding: Decoding) -> list[Sensitivity]:
    """Measured on random codes, where both are nearly as on those of images.

    A function of the weights alone, so that codes do not depend on what else is encoded.
    """
    generator = torch.Generator().manual_seed(0)
    quantized = []
    for group, config in zip(decoding.top_down, decoding.configs, strict=True):
        side = COARSEST_SIDE * decoding.configs[0].downsampling // config.downsampling
        layers = [
            torch.randint(size, (NUM_MAPS, side, side), generator=generator)
            for size in config.codebook_sizes
        ]
        device = group.quantizer.codebook(0).device
        quantized.append(group.quantized(torch.stack(layers, 1).to(device)).detach())
    with torch.no_grad():
        states = decoding.top_down.states(quantized)
    sensitivities = []
    for number, group in enumerate(decoding.top_down):
        with torch.no_grad():
            upsampled = group.upsampled(states[number - 1] if number else None)
        last = quantized[number:]
        sensitivities.append(
            Sensitivity(
                _reach(decoding, last, upsampled, decoding.configs[number].downsampling),
                _factor(decoding, last, upsampled, generator),
            )
        )
    return sensitivities


@torch.no_grad()
def _reach(
    decoding: Decoding, quantized: Sequence[Tensor], upsampled: Tensor | None, downsampling: int
) -> int | None:
    """The central position of each map gets the vector of another map."""
    changed = quantized[0].clone()
    center = changed.shape[-1] // 2
    changed[:, :, center, center] = quantized[0].roll(1, 0)[:, :, center, center]
    before = decoding.images(quantized, upsampled)
    after = decoding.images([changed, *quantized[1:]], upsampled)
    energy = squared_error_cells(after - before, downsampling).double().mean(0)
    distance = (torch.arange(len(energy), device=energy.device) - center).abs()
    distance = torch.maximum(distance[:, None], distance)
    for reach in range(COARSEST_SIDE // 2):
        if energy[distance <= reach].sum() >= SHARE_WITHIN_REACH * energy.sum():
            return reach
    return None


def _factor(
    decoding: Decoding,
    quantized: Sequence[Tensor],
    upsampled: Tensor | None,
    generator: torch.Generator,
) -> Float[Tensor, "dim dim"]:
    """E[(Jᵀn)(Jᵀn)ᵀ] = JᵀJ for normal n."""
    vectors = quantized[0].clone().requires_grad_()
    with torch.enable_grad():
        images = decoding.images([vectors, *quantized[1:]], upsampled)
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for probe in range(NUM_PROBES):
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        (gradient,) = torch.autograd.grad(
            images, vectors, noise.to(images.device), retain_graph=probe < NUM_PROBES - 1
        )
        rows = gradient.movedim(1, -1).flatten(0, 2).double().cpu()
        total += rows.T @ rows / (len(rows) * NUM_PROBES)
    damping = max(DAMPING * total.diagonal().mean().item(), torch.finfo(torch.float32).tiny)
    total.diagonal().add_(damping)
    factor: Tensor = torch.linalg.cholesky(total).to(vectors)
    return factor
