"""How codes and reconstructions change when images are shifted, blurred, made noisy."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import gaussian_blur

from pipelines.evaluation.code_statistics import EncodedImages, decode, encode
from tokenizer import Tokenizer

Images = UInt8[Tensor, "images channels height width"]

SHIFTS = (1, 2)
"""Pixels to the right, beside the side of the coarsest cell."""
BLURS = (0.5, 1.0, 2.0)
"""Standard deviations of the Gaussian in pixels."""
NOISES = (0.02, 0.05, 0.1)
"""Standard deviations on [0, 1]."""


class Change(NamedTuple):
    """Something that is done to images."""

    name: str
    apply: Callable[[Images], Images]
    shift: int = 0
    """Pixels by which the content moves to the right."""


class Robustness(NamedTuple):
    """What a change does; RMSE on [0, 1] after 8-bit rounding.

    What has moved is compared where it has come to lie: pixels exactly, codes at the nearest place
    of their map, without what came in at the border.
    """

    change: str
    kept: list[float]
    """Share of codes that stay the same, of each layer from coarse to fine."""
    input_rmse: float
    """Of changed and unchanged images: how far the change goes."""
    output_rmse: float
    """Of their reconstructions: how much of it comes out again."""
    error_rmse: float
    """Of changed images and their reconstructions."""


def changes(height: int, width: int, coarsest: int) -> list[Change]:
    """What is measured of images of this size, of which a coarsest cell has this side."""
    shifts = sorted({shift for shift in (*SHIFTS, coarsest) if shift < min(height, width)})
    return [
        Change("unchanged", lambda images: images),
        *(Change(f"shifted by {by} px", partial(shifted, pixels=by), by) for by in shifts),
        *(Change(f"blurred, σ {by:g} px", partial(blurred, deviation=by)) for by in BLURS),
        *(Change(f"noise, σ {by:g}", partial(noisy, deviation=by)) for by in NOISES),
    ]


def shifted(images: Images, pixels: int) -> Images:
    """Moved to the right; the left column is repeated into the gap."""
    return torch.cat([images[..., :1].expand(*[-1] * 3, pixels), images[..., :-pixels]], -1)


def blurred(images: Images, deviation: float) -> Images:
    """By a Gaussian of this standard deviation in pixels."""
    reach = int(4 * deviation + 0.5)
    floats = pad(images.float(), [reach] * 4, mode="replicate")
    blur: Tensor = gaussian_blur(floats, [2 * reach + 1] * 2, [deviation] * 2)
    return blur[..., reach:-reach, reach:-reach].round().clamp(0, 255).to(torch.uint8)


def noisy(images: Images, deviation: float) -> Images:
    """With independent Gaussian noise, the same at every call for as many images."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def measure_robustness(tokenizer: Tokenizer, encoded: EncodedImages) -> list[Robustness]:
    """The effect of each change on codes and reconstructions."""
    images, height, width = encoded.images, *encoded.images.shape[-2:]
    coarsest = tokenizer.config.groups[0].downsampling
    reconstructions = decode(tokenizer, encoded.indices)
    results = []
    for change in changes(height, width, coarsest):
        changed = change.apply(images)
        codes = EncodedImages(changed, encode(tokenizer, changed), encoded.labels)
        outputs = decode(tokenizer, codes.indices)
        kept = [
            _kept(old, new, round(change.shift * old.shape[-1] / width))
            for old, new in zip(encoded.layers, codes.layers, strict=True)
        ]
        results.append(
            Robustness(
                change.name,
                kept,
                _rmse(*_aligned(images, changed, change.shift)),
                _rmse(*_aligned(reconstructions, outputs, change.shift)),
                _rmse(changed, outputs),
            )
        )
    return results


def _aligned(old: Tensor, new: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """What lies in both, at the same place."""
    return old[..., : old.shape[-1] - shift], new[..., shift:]


def _kept(old: Tensor, new: Tensor, shift: int) -> float:
    before, after = _aligned(old, new, shift)
    return (before == after).double().mean().item()


def _rmse(images: Tensor, others: Tensor) -> float:
    """On [0, 1], of the whole set."""
    return ((images.double() - others.double()).square().mean().sqrt() / 255).item()
