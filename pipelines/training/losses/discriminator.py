"""A patch discriminator (pix2pix, arXiv 1611.07004): one logit for each patch of an image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.recipe import AdversarialConfig
from tokenizer.storage.errors import InputError


class PatchDiscriminator(nn.Module):
    """Convolutions of stride 2, each with group normalization but the first, and a last one.

    No statistics over the batch: micro-batches and processes do not change what it computes. The
    running means of its outputs are those of LeCam; the loss moves them. It counts, too, the
    validations in a row that it has won.

    Raises:
        InputError: the images are too small for so many convolutions.
    """

    real_mean: Tensor
    fake_mean: Tensor
    num_won: Tensor

    def __init__(self, config: AdversarialConfig, channels: int, image_size: int) -> None:
        super().__init__()
        if image_size >> config.num_downsamplings < 1:
            raise InputError(
                f"recipe.adversarial.num_downsamplings must be at most "
                f"{image_size.bit_length() - 1} for images of {image_size} pixels, "
                f"got {config.num_downsamplings}"
            )
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, config.num_downsamplings):
            wider = config.width * min(2**number, 8)
            norm = nn.GroupNorm(1, wider)
            layers += [nn.Conv2d(width, wider, 4, 2, 1), norm, nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for name in ("real_mean", "fake_mean"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("num_won", torch.zeros((), dtype=torch.int64))

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1 _ _"]:
        """Logits, positive for what seems real; `images` on about [-1, 1]."""
        logits: Tensor = self.layers(images)
        return logits.float()
