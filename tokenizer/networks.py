"""Residual networks after VDVAE (arXiv 2011.10650): blocks, bottom-up path, upward path."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tokenizer.config import NetworkConfig


class ResidualBlock(nn.Module):
    """Bottleneck block without normalization: GELU before 1×1, 3×3, 3×3, 1×1 convolutions.

    `scale` multiplies the last convolution's initial weights: 1/√(blocks in the path) keeps the
    variance of a deep path at that of one block.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        hidden = max(channels // 4, 1)
        last = nn.Conv2d(hidden, channels, 1)
        with torch.no_grad():
            last.weight *= scale
        self.layers = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GELU(),
            last,
        )

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Adds what the block computes to `features`."""
        output: Tensor = features + self.layers(features)
        return output


class SelfAttention(nn.Module):
    """Residual self-attention over a map; heads of at most 64 channels, one head if uneven."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.num_heads = math.ceil(channels / 64)
        if channels % self.num_heads:
            self.num_heads = 1
        self.norm = nn.GroupNorm(1, channels)
        self.to_query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.to_output = nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            self.to_output.weight *= scale

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Adds to each position what it attends to."""
        height, width = features.shape[-2:]
        joint = self.to_query_key_value(self.norm(features))  # (B, 3C, H, W)
        heads = joint.view(len(joint), 3, self.num_heads, -1, height * width).transpose(-1, -2)
        query, key, value = heads.unbind(1)  # (B, heads, H·W, C / heads)
        attended = functional.scaled_dot_product_attention(query, key, value)
        merged = attended.transpose(-1, -2).reshape(features.shape)
        output: Tensor = features + self.to_output(merged)
        return output


class Widths:
    """Channels and stages by downsampling factor, the same for all paths of one tokenizer."""

    def __init__(self, config: NetworkConfig, coarsest: int) -> None:
        self.config = config
        num_levels = (coarsest // config.patch_size).bit_length()
        self._scale = 1 / math.sqrt(config.num_blocks * num_levels)

    def __getitem__(self, downsampling: int) -> int:
        """Channels at one resolution."""
        return min(
            self.config.width * downsampling // self.config.patch_size, self.config.max_width
        )

    def stage(self, downsampling: int) -> nn.Sequential:
        """The blocks of one path at one resolution."""
        channels = self[downsampling]
        blocks: list[nn.Module] = [
            ResidualBlock(channels, self._scale) for _ in range(self.config.num_blocks)
        ]
        if downsampling in self.config.attention_downsampling:
            blocks.append(SelfAttention(channels, self._scale))
        return nn.Sequential(*blocks)


class BottomUpPath(nn.Module):
    """Image to features at each requested resolution."""

    def __init__(self, widths: Widths, channels: int, downsamplings: Sequence[int]) -> None:
        super().__init__()
        patch_size = widths.config.patch_size
        self.downsamplings = tuple(downsamplings)
        self.patch_size = patch_size
        self.stem = nn.Conv2d(channels * patch_size**2, widths[patch_size], 3, padding=1)
        self.stages = nn.ModuleDict({str(patch_size): widths.stage(patch_size)})
        self.downsample = nn.ModuleDict()
        factor = patch_size
        while factor < max(downsamplings):
            factor *= 2
            self.downsample[str(factor)] = nn.Conv2d(widths[factor // 2], widths[factor], 2, 2)
            self.stages[str(factor)] = widths.stage(factor)
        self.out_channels = [widths[factor] for factor in self.downsamplings]

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Features in the order of `downsamplings`."""
        features: Tensor = self.stem(functional.pixel_unshuffle(images, self.patch_size))
        by_factor: dict[int, Tensor] = {}
        for factor, stage in self.stages.items():
            if factor in self.downsample:
                features = self.downsample[factor](features)
            features = by_factor[int(factor)] = stage(features)
        return [by_factor[factor] for factor in self.downsamplings]


class UpwardPath(nn.Module):
    """Blocks, ×2, blocks and so on, from one downsampling factor to a finer one or the same."""

    def __init__(
        self, widths: Widths, in_channels: int, coarse: int, fine: int, out_channels: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[coarse], 1), widths.stage(coarse)]
        factor = coarse
        while factor > fine:
            factor //= 2
            # A 1×1 convolution and a pixel shuffle: all work at the coarse resolution.
            layers += [nn.Conv2d(widths[2 * factor], 4 * widths[factor], 1), nn.PixelShuffle(2)]
            layers.append(widths.stage(factor))
        layers.append(nn.Conv2d(widths[fine], out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch _ _ _"]:
        """The map at the finer resolution."""
        output: Tensor = self.layers(features)
        return output


class ImageDecoder(UpwardPath):
    """The state y to an image: an upward path to patches, a pixel shuffle, perhaps a head.

    Neighbors in different patches come from different channels, which leaves a grid. The head's
    convolutions see across its lines; it adds to the image, and nothing at the start.
    """

    def __init__(self, widths: Widths, in_channels: int, coarse: int, channels: int) -> None:
        patch_size = widths.config.patch_size
        super().__init__(widths, in_channels, coarse, patch_size, channels * patch_size**2)
        self.patch_size = patch_size
        self.head: nn.Sequential | None = None
        width = widths.config.head_width
        if width > 0:
            last = nn.Conv2d(width, channels, 3, padding=1)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            first = nn.Conv2d(channels, width, 3, padding=1)
            self.head = nn.Sequential(first, nn.GELU(), last)

    @property
    def last_layer(self) -> nn.Conv2d:
        """What makes the pixels."""
        last = (self.layers if self.head is None else self.head)[-1]
        assert isinstance(last, nn.Conv2d)
        return last

    def forward(
        self, features: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch channels _ _"]:
        """Images, in float32 or above whatever the autocast, since SSE is summed from them."""
        # The state adds up in float32 whatever the type of the weights.
        patches = super().forward(features.to(self.last_layer.weight.dtype))
        images = functional.pixel_shuffle(patches, self.patch_size)
        shown = images if images.dtype == torch.float64 else images.float()
        return shown if self.head is None else shown + self.head(images)
