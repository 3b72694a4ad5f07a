"""Structural similarity of images."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SSIM_WINDOW = 11
"""Side in pixels, and the smallest of an image."""


def structural_similarity(
    images: Float[Tensor, "batch channels height width"],
    others: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, " batch"]:
    """SSIM of images on [0, 1] (Wang et al. 2004, eq. 13), where the Gaussian window fits.

    Borders are not padded. Float32 is off by less than 1e-6: each channel's mean is subtracted
    before the squares are.
    """
    shift = images.mean((2, 3), keepdim=True)
    x, y = images - shift, others - shift
    rows, columns = (_window_matrix(side).to(images) for side in images.shape[2:])
    # (5, B, C, H - 10, W - 10)
    mean_x, mean_y, xx, yy, xy = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
    contrast = (2 * (xy - mean_x * mean_y) + 0.03**2) / (
        xx - mean_x.square() + yy - mean_y.square() + 0.03**2
    )
    mean_x, mean_y = mean_x + shift, mean_y + shift
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    similarity: Tensor = (luminance * contrast).flatten(1).mean(1)
    return similarity


def _window_matrix(side: int) -> Float64[Tensor, "positions side"]:
    """Rows of SSIM's window, σ = 1.5, at each position along one side."""
    offsets = torch.arange(side) - torch.arange(side - SSIM_WINDOW + 1)[:, None] - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.double().square() / (2 * 1.5**2))
    weights = torch.where(offsets.abs() <= SSIM_WINDOW // 2, weights, 0)
    return weights / weights.sum(1, keepdim=True)
