"""The grid that a pixel shuffle leaves: how much of a picture repeats with the patch."""

import torch
from jaxtyping import UInt8
from torch import Tensor


def grid_energy(images: UInt8[Tensor, "batch channels height width"], patch_size: int) -> float:
    """Power at the patch's frequency along rows and columns, over that at its neighbors.

    About 1 for images without a grid, whose spectrum is smooth. Mean over images, both directions
    and the frequencies k / patch_size, each against the mean of the two next to it.
    """
    centered = images.double() - images.double().mean((2, 3), keepdim=True)
    ratios = []
    for dim in (-2, -1):
        size = images.shape[dim]
        power = torch.fft.rfft(centered, dim=dim).abs().square()
        power = power.mean([own for own in range(4) if own != dim % 4])  # (size // 2 + 1,)
        for number in range(1, patch_size // 2 + 1):
            place = number * size // patch_size
            around = [power[near] for near in (place - 1, place + 1) if near < len(power)]
            ratios.append(power[place] / torch.stack(around).mean())
    return float(torch.stack(ratios).mean())
