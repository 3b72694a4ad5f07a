"""Stochastic quantization of N latents with K codes (SQ-VAE, arXiv 2205.07547, section 3).

It is attention with the codes as keys and values, a bias of -‖b‖² / 2s², Gumbel noise and a
temperature, and an entropy beside it. An N × K matrix of it takes gigabytes where N and K are
large, so it runs in blocks of rows, forward and backward; the noise is a function of a seed and the
block, and backward draws it again. `plain_mixture` is the same with whole matrices, for reading
and for tests; `tokenizer/quantizers/mixture_triton.py` holds one kernel for it.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer.quantizers.base import Draw, Mode, full_precision

BLOCK_SIZE = {"cpu": 2**18, "cuda": 2**24}
"""Matrix elements worked on at once: what fits a processor's cache, and what fills a GPU."""
KEPT_SIZE = 2**22
"""Two matrices of up to so many elements (32 MiB together, for each layer) are kept for backward,
which is then faster; larger ones are computed anew."""


def code_biases(
    codebook: Float[Tensor, "codes dim"], precision: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, " codes"]:
    """-‖b_k‖² / 2s²."""
    return codebook.square().sum(1) * (-precision / 2)


def proximity(
    latents: Float[Tensor, "positions dim"],
    codebook: Float[Tensor, "codes dim"],
    precision: Float[Tensor, ""] | float = 1.0,
    bias: Float[Tensor, " codes"] | None = None,
) -> Float[Tensor, "positions codes"]:
    """-‖ẑ - b_k‖² / 2s² up to ‖ẑ‖² / 2s², which no softmax over k and no arg max sees.

    `precision` is 1 / s²; `bias` is `code_biases` where many blocks share it.
    """
    if bias is None:
        bias = code_biases(codebook, precision)
    return torch.addmm(bias, latents * precision, codebook.T)


def nearest_codes(
    latents: Float[Tensor, "positions dim"], codebook: Float[Tensor, "codes dim"]
) -> Int[Tensor, " positions"]:
    """Index of the nearest code, the first of several: arg min_k ‖ẑ - b_k‖."""
    with torch.no_grad():
        origin = codebook.mean(0)
        codebook = codebook - origin  # see `centered`
        bias = code_biases(codebook)
        # One tensor: many small ones would lie between the blocks, and keep their memory apart.
        found = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
        scores = rows_at_origin = latents.new_empty(0)
        for _, rows in row_blocks(latents, codebook):
            block = latents[rows]
            if len(block) != len(scores):
                scores = block.new_empty(len(block), len(codebook))
                rows_at_origin = torch.empty_like(block)
            # As `proximity`, into memory that is warm.
            torch.sub(block, origin, out=rows_at_origin)
            torch.addmm(bias, rows_at_origin, codebook.T, out=scores)
            found[rows] = scores.argmax(1)
    return found


def centered(
    latents: Float[Tensor, "positions dim"], codebook: Float[Tensor, "codes dim"]
) -> tuple[Float[Tensor, "positions dim"], Float[Tensor, "codes dim"], Float[Tensor, " dim"]]:
    """Both relative to the mean of the codebook, and that mean.

    Distances stay as they are; far from the origin, float32 has no digits left for their
    differences. The mean has no gradient, since the same constant is taken from both.
    """
    origin = codebook.detach().mean(0)
    return latents - origin, codebook - origin, origin


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed of the noise, from the generator, or from the CPU's own without waiting for a GPU."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def gumbel_noise(
    latents: Float[Tensor, "positions dim"], codebook: Float[Tensor, "codes dim"], seed: int
) -> Float[Tensor, "positions codes"]:
    """All the noise that blocks draw piece by piece."""
    parts = [_noise(latents[rows], codebook, seed, b) for b, rows in row_blocks(latents, codebook)]
    return torch.cat(parts)


def stochastic_quantization(
    latents: Float[Tensor, "positions dim"],
    codebook: Float[Tensor, "codes dim"],
    variance: Float[Tensor, ""],
    temperature: float,
    mode: Mode,
    generator: torch.Generator | None = None,
) -> Draw:
    """P(k | ẑ) = softmax_k(-‖ẑ - b_k‖² / 2s²), and what is drawn from it (SQ-VAE, section 3).

    Args:
        latents: ẑ.
        codebook: b_k.
        variance: s².
        temperature: τ of the mixture; unused otherwise.
        mode: see `Mode`. Gradients reach latents, codebook and variance in "mixture", and the
            chosen codes otherwise.
        generator: of the noise; the CPU's own if None.
    """
    if mode == "nearest":
        indices = nearest_codes(latents, codebook)
        return Draw(codebook[indices], indices, torch.zeros_like(latents[:, 0]))
    seed = draw_seed(generator)
    near_latents, near_codebook, origin = centered(latents, codebook)
    if mode == "sample":
        indices, posterior_entropy = _sampled(near_latents, near_codebook, variance, seed)
        return Draw(codebook[indices], indices, posterior_entropy)
    draw = _mixture(near_latents, near_codebook, variance, temperature, seed)
    return draw._replace(quantized=draw.quantized + origin)


def _mixture(
    latents: Tensor, codebook: Tensor, variance: Tensor, temperature: float, seed: int
) -> Draw:
    if latents.is_cuda and importlib.util.find_spec("triton") is not None:  # only on a GPU
        from tokenizer.quantizers.mixture_triton import can_fuse, fused_mixture

        if can_fuse(latents):
            return fused_mixture(latents, codebook, variance, temperature, seed)
    return blocked_mixture(latents, codebook, variance, temperature, seed)


def blocked_mixture(
    latents: Float[Tensor, "positions dim"],
    codebook: Float[Tensor, "codes dim"],
    variance: Float[Tensor, ""],
    temperature: float,
    seed: int,
) -> Draw:
    """The mode "mixture" in blocks of rows, on any device."""
    return Draw(*_BlockedMixture.apply(latents, codebook, variance, temperature, seed))


def plain_mixture(
    latents: Float[Tensor, "positions dim"],
    codebook: Float[Tensor, "codes dim"],
    variance: Float[Tensor, ""],
    temperature: float,
    gumbel: Float[Tensor, "positions codes"],
) -> Draw:
    """The mode "mixture" with whole matrices and given noise: what the fast versions must equal."""
    log_posterior = proximity(latents, codebook, 1 / variance).log_softmax(1)
    posterior_entropy = -(log_posterior.exp() * log_posterior).sum(1)
    perturbed = log_posterior + gumbel
    weights = (perturbed / temperature).softmax(1)
    return Draw(weights @ codebook, perturbed.argmax(1), posterior_entropy)


def row_blocks(latents: Tensor, codebook: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each block of latents."""
    size = BLOCK_SIZE.get(latents.device.type, BLOCK_SIZE["cpu"])
    step = max(1, size // len(codebook))
    for number, start in enumerate(range(0, len(latents), step)):
        yield number, slice(start, start + step)


def _noise(rows: Tensor, codebook: Tensor, seed: int, block: int) -> Tensor:
    """Gumbel noise of one block; uniform numbers of 24 bits, neither 0 nor 1, make it finite."""
    generator = torch.Generator(rows.device).manual_seed(seed + block)
    noise = rows.new_empty(len(rows), len(codebook))
    return noise.uniform_(2**-25, 1, generator=generator).log_().neg_().log_().neg_()


class _Block(NamedTuple):
    """The matrices of some rows, (n, K)."""

    log_posterior: Tensor
    weights: Tensor
    indices: Tensor
    """(n,): the heaviest code."""


def _mixed(
    latents: Tensor,
    codebook: Tensor,
    precision: Tensor,
    bias: Tensor,
    temperature: float,
    noise: Tensor,
) -> _Block:
    log_posterior = proximity(latents, codebook, precision, bias).log_softmax(1)
    perturbed = noise.add_(log_posterior)
    indices = perturbed.argmax(1)
    return _Block(log_posterior, perturbed.div_(temperature).softmax(1), indices)


def _entropy(log_posterior: Tensor) -> Tensor:
    entropies: Tensor = -torch.linalg.vecdot(log_posterior.exp(), log_posterior)
    return entropies


@torch.no_grad()
def _sampled(
    latents: Tensor, codebook: Tensor, variance: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    entropies = torch.empty_like(latents[:, 0])
    indices = torch.empty_like(entropies, dtype=torch.int64)
    bias = code_biases(codebook, 1 / variance)
    for block, rows in row_blocks(latents, codebook):
        log_posterior = proximity(latents[rows], codebook, 1 / variance, bias).log_softmax(1)
        entropies[rows] = _entropy(log_posterior)
        indices[rows] = _noise(latents[rows], codebook, seed, block).add_(log_posterior).argmax(1)
    return indices, entropies


class _BlockedMixture(torch.autograd.Function):
    """`plain_mixture` in blocks of rows, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        codebook: Tensor,
        variance: Tensor,
        temperature: float,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized (N, D), indices (N,) and entropies (N,)."""
        is_kept = any(ctx.needs_input_grad) and len(latents) * len(codebook) <= KEPT_SIZE
        quantized = torch.empty_like(latents)
        entropies = torch.empty_like(latents[:, 0])
        indices = torch.empty_like(entropies, dtype=torch.int64)
        kept: list[Tensor] = []
        precision = 1 / variance
        bias = code_biases(codebook, precision)
        for block, rows in row_blocks(latents, codebook):
            noise = _noise(latents[rows], codebook, seed, block)
            mixed = _mixed(latents[rows], codebook, precision, bias, temperature, noise)
            torch.mm(mixed.weights, codebook, out=quantized[rows])
            entropies[rows] = _entropy(mixed.log_posterior)
            indices[rows] = mixed.indices
            if is_kept:
                kept += [mixed.log_posterior, mixed.weights]
        ctx.save_for_backward(latents, codebook, variance, entropies, *kept)
        ctx.temperature, ctx.seed = temperature, seed
        ctx.mark_non_differentiable(indices)
        return quantized, indices, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_quantized: Tensor, _: Any, grad_entropies: Tensor
    ) -> tuple[Tensor | None, ...]:
        """With a = log P up to a constant, u = (a + noise) / τ, w = softmax(u), z = Σ_k w_k b_k.

        ∂z/∂u = w (b - z) and ∂H/∂a = -P (log P + H). Both sum to zero over k, so that constants
        in a, log P's normalizer among them, have no gradient.
        """
        latents, codebook, variance, entropies, *kept = ctx.saved_tensors
        precision = 1 / variance
        bias = code_biases(codebook, precision)
        grad_latents = torch.empty_like(latents)
        grad_codebook = torch.zeros_like(codebook)
        totals = torch.zeros_like(codebook[:, 0])  # (K,)
        grad_variance = torch.zeros_like(variance)
        with full_precision(latents.device):
            for block, rows in row_blocks(latents, codebook):
                block_latents, block_grad = latents[rows], grad_quantized[rows]
                if kept:
                    log_posterior, weights = kept[2 * block], kept[2 * block + 1]
                else:
                    noise = _noise(block_latents, codebook, ctx.seed, block)
                    log_posterior, weights, _ = _mixed(
                        block_latents, codebook, precision, bias, ctx.temperature, noise
                    )
                grad_codebook.addmm_(weights.T, block_grad)
                grad = block_grad @ codebook.T  # ∂/∂w, then ∂/∂a: (n, K)
                grad -= torch.linalg.vecdot(weights, grad).unsqueeze(1)
                grad.mul_(weights).div_(ctx.temperature)
                posterior = log_posterior.exp().mul_(grad_entropies[rows].unsqueeze(1))
                grad -= posterior.mul_(log_posterior + entropies[rows].unsqueeze(1))
                torch.mm(grad, codebook, out=grad_latents[rows])
                grad_codebook.addmm_(grad.T, block_latents * precision)
                totals += grad.sum(0)
                grad_variance -= torch.linalg.vecdot(grad, log_posterior).sum()
            grad_codebook -= (totals * precision).unsqueeze(1) * codebook
        return grad_latents * precision, grad_codebook, grad_variance * precision, None, None
