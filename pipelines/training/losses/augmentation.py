"""DiffAugment (arXiv 2006.10738): keeps a discriminator from learning a small data set by heart."""

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.recipe import Augmentation

Images = Float[Tensor, "batch channels height width"]


def augment(
    images: Images, augmentations: Collection[Augmentation], generator: torch.Generator
) -> Images:
    """Images on [-1, 1], each changed at random and differentiably.

    Args:
        images: real or reconstructed.
        augmentations: "color" (brightness ±1/2, saturation × 0 to 2, contrast × 1/2 to 3/2),
            "translation" (up to an eighth of each side, zeros move in), "cutout" (a rectangle of
            half of each side becomes 0).
        generator: on the images' device.
    """
    if "color" in augmentations:
        brightness, saturation, contrast = _uniform(images, 3, generator).unbind(1)
        images = images + brightness - 0.5
        gray = images.mean(1, keepdim=True)
        images = gray + (images - gray) * 2 * saturation
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * (contrast + 0.5)
    if "translation" in augmentations:
        for dim in (-2, -1):
            images = _shifted(images, dim, generator)
    if "cutout" in augmentations:
        inside = [_half(images, dim, generator) for dim in (-2, -1)]
        images = images * ~(inside[0] & inside[1])
    return images


def _uniform(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(B, count, 1, 1, 1) numbers in [0, 1)."""
    shape = (len(images), count, 1, 1, 1)
    return torch.rand(shape, generator=generator, device=images.device)


def _shifted(images: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Each image moved along one side by up to an eighth of it."""
    size = images.shape[dim]
    most = (size + 4) // 8
    shift = (_uniform(images, 1, generator).flatten() * (2 * most + 1)).long() - most  # (B,)
    source = torch.arange(size, device=images.device) - shift[:, None]  # (B, size)
    shape = [len(images), 1, 1, 1]
    shape[dim] = size
    is_known = ((source >= 0) & (source < size)).view(shape)
    places = source.clamp(0, size - 1).view(shape).expand_as(images)
    return images.gather(dim, places) * is_known


def _half(images: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """True in an interval of half of the side, whose center is anywhere in the image."""
    size = images.shape[dim]
    center = (_uniform(images, 1, generator).flatten() * size).long()  # (B,)
    start = center[:, None] - size // 4
    places = torch.arange(size, device=images.device)
    shape = [len(images), 1, 1, 1]
    shape[dim] = size
    return ((places >= start) & (places < start + (size + 1) // 2)).view(shape)
