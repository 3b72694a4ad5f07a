"""Structural similarity of images."""

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

SSIM_WINDOW = 11
"""Side in pixels, and the smallest of an image."""


def structural_similarity(
    images: UInt8[Tensor, "batch channels height width"],
    others: UInt8[Tensor, "batch channels height width"],
) -> Float64[Tensor, " batch"]:
    """SSIM of each image (Wang et al. 2004, eq. 13), mean over positions and channels.

    Positions are those where the Gaussian window of σ = 1.5 fits, as published: borders are not
    padded.
    """
    rows, columns = (_window_matrix(side).to(images.device) for side in images.shape[2:])
    values = []
    for x, y in zip(images.double() / 255, others.double() / 255, strict=True):
        # One image after the other, whose sums then do not depend on its batch.
        moments = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
        mean_x, mean_y, xx, yy, xy = moments  # (C, H - 10, W - 10)
        means = mean_x.square() + mean_y.square()
        luminance = (2 * mean_x * mean_y + 0.01**2) / (means + 0.01**2)
        contrast = (2 * (xy - mean_x * mean_y) + 0.03**2) / (xx + yy - means + 0.03**2)
        values.append((luminance * contrast).mean())
    return torch.stack(values)


def _window_matrix(side: int) -> Float64[Tensor, "positions side"]:
    """Weights of the window, which is separable, at each position along one side."""
    offsets = torch.arange(side) - torch.arange(side - SSIM_WINDOW + 1)[:, None] - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.double().square() / (2 * 1.5**2))
    weights = torch.where(offsets.abs() <= SSIM_WINDOW // 2, weights, 0)
    return weights / weights.sum(1, keepdim=True)
