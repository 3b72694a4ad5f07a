"""Small tokenizers and random inputs that the tests of this folder share."""

import torch
from torch import Tensor

from tokenizer import GroupConfig, Quantizer, Tokenizer, TokenizerConfig, hq_vae
from tokenizer.builders import deterministic
from tokenizer.config import FiniteScalarQuantizerConfig, NetworkConfig

NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)
HYBRID = hq_vae((8, 4), (2, 3), 6, 4, networks=NETWORKS)
BASELINE = deterministic(HYBRID)
FSQ = HYBRID.model_copy(update={"quantizer": FiniteScalarQuantizerConfig(levels=(3, 2))})
KINDS = {"stochastic": HYBRID, "nearest": BASELINE, "fsq": FSQ}


def make_tokenizer(config: TokenizerConfig = HYBRID, seed: int = 0) -> Tokenizer:
    """A float64 tokenizer in training mode whose layers differ in s²."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config).double()
    offset = 0.0
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("log_variances"):
                parameter.copy_(offset + 0.4 * torch.arange(len(parameter)))
                offset -= 0.7
    return tokenizer


def group_of(sizes: tuple[int, ...], dim: int = 3, shares_codebook: bool = False) -> GroupConfig:
    return GroupConfig(
        downsampling=1, codebook_sizes=sizes, code_dim=dim, shares_codebook=shares_codebook
    )


def random_images(seed: int = 1, batch: int = 2, channels: int = 3, side: int = 8) -> Tensor:
    shape = (batch, channels, side, 2 * side)
    return 2 * torch.rand(shape, generator=seeded(seed), dtype=torch.float64) - 1


def random_latents(dim: int = 3, seed: int = 1, batch: int = 2, side: int = 2) -> Tensor:
    return torch.randn(batch, dim, side, side + 1, generator=seeded(seed), dtype=torch.float64)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def summed_codes(quantizer: Quantizer, indices: Tensor) -> Tensor:
    """Code vectors of all layers, (B, D, h, w), added in their order."""
    total = torch.zeros_like(quantizer.codebook(0)[indices[:, 0]])
    for layer in range(quantizer.num_layers):
        total = total + quantizer.codebook(layer)[indices[:, layer]]
    return total.movedim(-1, 1)
