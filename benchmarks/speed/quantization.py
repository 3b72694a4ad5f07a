"""Quantization: blocks and the fused kernel beside whole matrices, torch and peers."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.measure import Budget, Comparison, device_of
from tokenizer.config import GroupConfig, StochasticQuantizerConfig
from tokenizer.quantizers.base import Draw, full_precision
from tokenizer.quantizers.mixture import (
    blocked_mixture,
    draw_seed,
    gumbel_noise,
    nearest_codes,
    plain_mixture,
    proximity,
    stochastic_quantization,
)
from tokenizer.quantizers.stochastic import StochasticQuantizer

TEMPERATURE = 0.7
Mixture = Callable[[Tensor, Tensor, Tensor], Draw]


class Size(NamedTuple):
    """N latents, K codes, D values each."""

    positions: int
    codes: int
    dim: int
    rounds: int = 7
    targets: Mapping[str, float] = {}

    @property
    def name(self) -> str:
        """As in titles."""
        return f"N {self.positions:,}, K {self.codes:,}, d {self.dim}"


AT_LEAST_PLAIN = {"whole matrices": 1.0}
FASTER = {"whole matrices": 1.3}
TRAINING = {
    "tiny": (Size(64, 8, 4, 2),),
    "cpu": (
        Size(4_096, 64, 32, targets=AT_LEAST_PLAIN),
        Size(4_096, 256, 32, targets=AT_LEAST_PLAIN),
        Size(4_096, 1_024, 64, targets=FASTER),
        Size(16_384, 1_024, 64, 5, FASTER),
        Size(4_096, 8_192, 64, 5, FASTER),
        Size(16_384, 8_192, 64, 3, FASTER),
        Size(65_536, 8_192, 64, 1),
    ),
    "gpu": (
        Size(16_384, 256, 64, 20, {"whole matrices": 3}),
        Size(65_536, 1_024, 64, 20, {"whole matrices": 3}),
        Size(65_536, 8_192, 64, 10, {"whole matrices": 3, "two products N × K × d": 0.5}),
    ),
}
USE = {
    "tiny": (Size(64, 8, 4, 2),),
    "cpu": (Size(4_096, 256, 64), Size(16_384, 1_024, 64), Size(16_384, 8_192, 64, 3)),
    "gpu": (Size(65_536, 1_024, 64, 20), Size(65_536, 8_192, 64, 20)),
}
DEPTH = 4
MOST_WHOLE = 2**28
"""Elements of a matrix beyond which a CPU's memory may not hold the dozen of whole ones."""


def comparisons(budget: Budget) -> Iterator[Comparison]:
    """A training step of the quantizer, and its use with hard codes."""
    device = device_of(budget).type
    for size in TRAINING[budget]:
        contenders: dict[str, Mixture] = {"ours": _ours}
        if device == "cuda" or size.positions * size.codes <= MOST_WHOLE:
            contenders["whole matrices"] = _plain
        if device == "cuda":  # only on a GPU
            contenders["blocks of rows"] = _blocked
            contenders["two products N × K × d"] = _products
        elif "whole matrices" in contenders:
            contenders["whole matrices, torch's exponential noise"] = _exponential
        yield Comparison(
            f"forward and backward, {size.name}",
            {name: functools.partial(_step, own, size, device) for name, own in contenders.items()},
            "latents",
            size.positions,
            size.rounds,
            targets=size.targets,
        )
    for size in USE[budget]:
        yield Comparison(
            f"nearest codes, {size.name}",
            {
                "ours": functools.partial(_use, nearest_codes, size, device),
                "cdist + argmin": functools.partial(_use, _cdist, size, device),
                "VectorQuantize": functools.partial(_vector_quantize, size, device),
            },
            "latents",
            size.positions,
            size.rounds,
            targets={"cdist + argmin": 1, "VectorQuantize": 1},
        )
        yield Comparison(
            f"residual stack of {DEPTH}, hard codes, {size.name}",
            {
                "ours": functools.partial(_stack, size, device),
                "ResidualVQ": functools.partial(_residual_vq, size, device),
            },
            "latents",
            size.positions,
            size.rounds,
            targets={"ResidualVQ": 1},
        )


def _inputs(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    latents = torch.randn(size.positions, size.dim, device=device)
    codebook = torch.randn(size.codes, size.dim, device=device)
    return latents, codebook, torch.tensor(5.0, device=device)


def _step(mixture: Mixture, size: Size, device: str) -> Callable[[], None]:
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs(size, device))

    def call() -> None:
        with full_precision(torch.device(device)):
            draw = mixture(*inputs)
            torch.autograd.grad((draw.quantized.sum(), draw.posterior_entropy.sum()), inputs)

    return call


def _ours(latents: Tensor, codebook: Tensor, variance: Tensor) -> Draw:
    return stochastic_quantization(latents, codebook, variance, TEMPERATURE, "mixture")


def _blocked(latents: Tensor, codebook: Tensor, variance: Tensor) -> Draw:  # only on a GPU
    return blocked_mixture(latents, codebook, variance, TEMPERATURE, draw_seed(None))


def _plain(latents: Tensor, codebook: Tensor, variance: Tensor) -> Draw:
    noise = gumbel_noise(latents, codebook, draw_seed(None))
    return plain_mixture(latents, codebook, variance, TEMPERATURE, noise)


def _exponential(latents: Tensor, codebook: Tensor, variance: Tensor) -> Draw:
    noise = -latents.new_empty(len(latents), len(codebook)).exponential_().log()
    return plain_mixture(latents, codebook, variance, TEMPERATURE, noise)


def _products(latents: Tensor, codebook: Tensor, variance: Tensor) -> Draw:  # only on a GPU
    """The products that forward cannot do without, and their gradients: a bound for time."""
    scores = proximity(latents, codebook, 1 / variance)
    return Draw(scores @ codebook, latents[:, 0].long(), latents[:, 0])


def _use(find: Callable[[Tensor, Tensor], Tensor], size: Size, device: str) -> Callable[[], None]:
    latents, codebook, _ = _inputs(size, device)

    @torch.no_grad()
    def call() -> None:
        with full_precision(torch.device(device)):
            _ = codebook[find(latents, codebook)]

    return call


def _cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(latents, codebook).argmin(1)


def _vector_quantize(size: Size, device: str) -> Callable[[], None]:
    from vector_quantize_pytorch import VectorQuantize

    peer = VectorQuantize(size.dim, size.codes).to(device).eval()
    latents, codebook, _ = _inputs(size, device)
    peer._codebook.embed.data.copy_(codebook.unsqueeze(0))
    return _called(peer, latents.unsqueeze(0))


def _residual_vq(size: Size, device: str) -> Callable[[], None]:
    from vector_quantize_pytorch import ResidualVQ

    peer = ResidualVQ(dim=size.dim, num_quantizers=DEPTH, codebook_size=size.codes)
    return _called(peer.to(device).eval(), _inputs(size, device)[0].unsqueeze(0))


def _stack(size: Size, device: str) -> Callable[[], None]:
    group = GroupConfig(downsampling=1, codebook_sizes=(size.codes,) * DEPTH, code_dim=size.dim)
    quantizer = StochasticQuantizer(group, StochasticQuantizerConfig()).to(device).eval()
    latents = _inputs(size, device)[0].T.reshape(1, size.dim, 1, size.positions)
    return _called(quantizer, latents, "nearest")


def _called(module: torch.nn.Module, *arguments: object) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        module(*arguments)

    return call
