"""The grid that decoders leave which draw their images as patches."""

import torch
from jaxtyping import Float
from torch import Tensor


def grid_energy(images: Float[Tensor, "batch channels height width"], period: int) -> float:
    """How much stands out in images that repeats every `period` pixels; 1 = nothing.

    The power spectrum of the absolute differences of neighbors along an axis, at the frequencies
    of that period, over its mean at the two frequencies below and the two above (after the measure
    of blocking artifacts of Wang, Bovik and Evans, ICIP 2000); mean of both axes.

    Args:
        images: of any scale; sides are multiples of `period`.
        period: side of a patch, at least 2.
    """
    return (_along_rows(images, period) + _along_rows(images.mT, period)) / 2


def _along_rows(images: Tensor, period: int) -> float:
    differences = images.double().diff().abs()
    mean = differences.mean(-1, keepdim=True)
    steps = torch.cat([mean, differences], -1) - mean  # (..., side); none over the border
    side = steps.shape[-1]
    power = torch.fft.fft(steps).abs().square().flatten(0, -2).mean(0)
    peaks = torch.arange(side // period, side // 2 + 1, side // period)
    around = torch.stack([power[(peaks + offset) % side] for offset in (-2, -1, 1, 2)])
    return float(power[peaks].sum() / around.mean(0).sum())
