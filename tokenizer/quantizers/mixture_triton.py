"""The mixture of `tokenizer/quantizers/mixture.py` as CUDA kernels that never leave the chip.

Forward walks the codes tile by tile with running maxima and sums, as attention kernels do; backward
computes tiles and noise anew, once for the latents and once for the codes. The noise comes from
Philox, a function of seed, position and code alone. `no_type_check` is for triton's sources.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer.quantizers.base import Draw

MAX_DIM = 64
"""Code vectors of at most so many values leave a program enough registers."""
MIN_CAPABILITY = (8, 0)
"""Products in three parts of TF32, which together are as exact as float32, need Ampere."""
NUM_PROGRAMS = 512
"""About as many programs share the gradient of the codes; a GPU has some hundred processors."""


@triton.jit
@no_type_check
def _gumbel(seed, rows, first_code, BLOCK_K: tl.constexpr):
    """Gumbel noise (rows, BLOCK_K); each call of Philox gives the bits of four codes."""
    quads = first_code // 4 + tl.arange(0, BLOCK_K // 4)
    counter = (quads[None, :] + rows[:, None] * 0).to(tl.uint32)
    position = (rows[:, None] + quads[None, :] * 0).to(tl.uint32)
    zero = counter * 0
    first, second, third, fourth = tl.philox(seed, counter, position, zero, zero)
    bits = tl.join(tl.join(first, second), tl.join(third, fourth))
    bits = tl.reshape(bits, (rows.shape[0], BLOCK_K))
    # 23 bits and a half: neither 0 nor 1, so that both logarithms are finite.
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
@no_type_check
def _rows(pointer, rows, num_rows, dim, BLOCK_D: tl.constexpr):
    """Rows of a (num_rows, dim) matrix, zero outside."""
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < dim)
    offsets = rows[:, None].to(tl.int64) * dim + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _store_rows(pointer, values, rows, num_rows, dim, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < dim)
    offsets = rows[:, None].to(tl.int64) * dim + columns[None, :]
    tl.store(pointer + offsets, values, mask=inside)


@triton.jit(do_not_specialize=["seed"])
@no_type_check
def _forward(
    latents, codebook, biases, quantized, indices, entropies, statistics,
    seed, inverse_temperature, num_rows, num_codes, dim,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows; `latents` hold ẑ / s², `biases` ‖b‖² / 2s².

    Scores are large where s² is small: all that is summed is relative to their maximum, and maxima
    and logarithms of sums are kept apart in `statistics` (4, rows).
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = _rows(latents, rows, num_rows, dim, BLOCK_D)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    weight_top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    weight_total = tl.zeros((BLOCK_N,), tl.float32)
    mixture = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, num_codes, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        vectors = _rows(codebook, codes, num_codes, dim, BLOCK_D)
        bias = tl.load(biases + codes, mask=codes < num_codes, other=float("inf"))
        scores = tl.dot(block, tl.trans(vectors), input_precision="tf32x3") - bias[None, :]
        perturbed = scores + _gumbel(seed, rows, start, BLOCK_K)

        highest, place = tl.max(perturbed, 1, return_indices=True)
        chosen = tl.where(highest > best, start + place, chosen)
        best = tl.maximum(best, highest)

        new_top = tl.maximum(top, tl.max(scores, 1))
        below = tl.where(codes[None, :] < num_codes, scores - new_top[:, None], 0.0)
        shares = tl.where(codes[None, :] < num_codes, tl.exp(below), 0.0)
        scale = tl.exp(top - new_top)
        fall = tl.where(total > 0, top - new_top, 0.0)
        moment = (moment + total * fall) * scale + tl.sum(shares * below, 1)
        total = total * scale + tl.sum(shares, 1)
        top = new_top

        logits = perturbed * inverse_temperature
        new_top = tl.maximum(weight_top, tl.max(logits, 1))
        weights = tl.exp(logits - new_top[:, None])
        scale = tl.exp(weight_top - new_top)
        weight_total = weight_total * scale + tl.sum(weights, 1)
        mixture = mixture * scale[:, None] + tl.dot(weights, vectors, input_precision="tf32x3")
        weight_top = new_top
    inside = rows < num_rows
    _store_rows(quantized, mixture / weight_total[:, None], rows, num_rows, dim, BLOCK_D)
    tl.store(indices + rows, chosen.to(tl.int64), mask=inside)
    tl.store(entropies + rows, tl.log(total) - moment / total, mask=inside)
    tl.store(statistics + rows, top, mask=inside)
    tl.store(statistics + num_rows + rows, tl.log(total), mask=inside)
    tl.store(statistics + 2 * num_rows + rows, weight_top, mask=inside)
    tl.store(statistics + 3 * num_rows + rows, tl.log(weight_total), mask=inside)


@triton.jit
@no_type_check
def _tile(
    block, block_grad, vectors, bias, rows, start, num_rows, num_codes, seed, inverse_temperature,
    entropies, statistics, grad_entropies, products,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights, gradient of the scores, and log P of a tile (rows, codes)."""
    inside = rows < num_rows
    codes = start + tl.arange(0, BLOCK_K)
    entropy = tl.load(entropies + rows, mask=inside, other=0.0)
    top = tl.load(statistics + rows, mask=inside, other=0.0)
    log_total = tl.load(statistics + num_rows + rows, mask=inside, other=0.0)
    weight_top = tl.load(statistics + 2 * num_rows + rows, mask=inside, other=0.0)
    log_weight_total = tl.load(statistics + 3 * num_rows + rows, mask=inside, other=0.0)
    grad_entropy = tl.load(grad_entropies + rows, mask=inside, other=0.0)
    product = tl.load(products + rows, mask=inside, other=0.0)
    scores = tl.dot(block, tl.trans(vectors), input_precision="tf32x3") - bias[None, :]
    logits = (scores + _gumbel(seed, rows, start, BLOCK_K)) * inverse_temperature
    is_real = inside[:, None] & (codes[None, :] < num_codes)
    weights = tl.exp((logits - weight_top[:, None]) - log_weight_total[:, None])
    weights = tl.where(is_real, weights, 0.0)
    log_posterior = (scores - top[:, None]) - log_total[:, None]
    log_posterior = tl.where(is_real, log_posterior, 0.0)
    grad = tl.dot(block_grad, tl.trans(vectors), input_precision="tf32x3")
    grad = weights * (grad - product[:, None]) * inverse_temperature
    posterior = tl.exp(log_posterior) * grad_entropy[:, None]
    grad = tl.where(is_real, grad - posterior * (log_posterior + entropy[:, None]), 0.0)
    return weights, grad, log_posterior


@triton.jit(do_not_specialize=["seed"])
@no_type_check
def _backward_latents(
    latents, codebook, biases, grad_quantized, entropies, statistics,
    grad_entropies, products, grad_latents, moments,
    seed, inverse_temperature, num_rows, num_codes, dim,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows: ∂/∂(ẑ / s²), and Σ_k ∂/∂score_k · log P_k for the variance."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = _rows(latents, rows, num_rows, dim, BLOCK_D)
    block_grad = _rows(grad_quantized, rows, num_rows, dim, BLOCK_D)
    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_codes, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        vectors = _rows(codebook, codes, num_codes, dim, BLOCK_D)
        bias = tl.load(biases + codes, mask=codes < num_codes, other=0.0)
        _, grad, log_posterior = _tile(
            block, block_grad, vectors, bias, rows, start, num_rows, num_codes, seed,
            inverse_temperature, entropies, statistics, grad_entropies, products, BLOCK_K,
        )  # fmt: skip
        result += tl.dot(grad, vectors, input_precision="tf32x3")
        moment += tl.sum(grad * log_posterior, 1)
    _store_rows(grad_latents, result, rows, num_rows, dim, BLOCK_D)
    tl.store(moments + rows, moment, mask=rows < num_rows)


@triton.jit(do_not_specialize=["seed"])
@no_type_check
def _backward_codebook(
    latents, codebook, biases, grad_quantized, entropies, statistics,
    grad_entropies, products, grad_codebooks, totals,
    seed, inverse_temperature, num_rows, num_codes, dim, rows_per_share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of codes and one share of the rows; shares are added up later, in a fixed order."""
    start = tl.program_id(0) * BLOCK_K
    share = tl.program_id(1)
    codes = start + tl.arange(0, BLOCK_K)
    vectors = _rows(codebook, codes, num_codes, dim, BLOCK_D)
    bias = tl.load(biases + codes, mask=codes < num_codes, other=0.0)
    result = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    first = share * rows_per_share
    for offset in range(0, rows_per_share, BLOCK_N):
        rows = first + offset + tl.arange(0, BLOCK_N)
        block = _rows(latents, rows, num_rows, dim, BLOCK_D)
        block_grad = _rows(grad_quantized, rows, num_rows, dim, BLOCK_D)
        weights, grad, _ = _tile(
            block, block_grad, vectors, bias, rows, start, num_rows, num_codes, seed,
            inverse_temperature, entropies, statistics, grad_entropies, products, BLOCK_K,
        )  # fmt: skip
        result += tl.dot(tl.trans(weights), block_grad, input_precision="tf32x3")
        result += tl.dot(tl.trans(grad), block, input_precision="tf32x3")
        total += tl.sum(grad, 0)
    base = share.to(tl.int64) * num_codes
    _store_rows(grad_codebooks + base * dim, result, codes, num_codes, dim, BLOCK_D)
    tl.store(totals + base + codes, total, mask=codes < num_codes)


def tile_sizes(dim: int) -> dict[str, int]:
    """Rows, codes and values of a tile, for which ptxas reports no spilled registers."""
    block_dim = max(16, triton.next_power_of_2(dim))
    return {"BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": block_dim, "num_warps": 8}


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device of the thread, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def can_fuse(latents: Tensor) -> bool:
    """Whether `fused_mixture` takes these latents (N, D) on their GPU."""
    return (
        latents.dtype == torch.float32
        and latents.shape[1] <= MAX_DIM
        and torch.cuda.get_device_capability(latents.device) >= MIN_CAPABILITY
    )


def fused_mixture(
    latents: Tensor, codebook: Tensor, variance: Tensor, temperature: float, seed: int
) -> Draw:
    """The mode "mixture" of float32 latents (N, D), D up to `MAX_DIM`, on a CUDA device."""
    return Draw(*_FusedMixture.apply(latents, codebook, variance, temperature, seed))


class _FusedMixture(torch.autograd.Function):
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
        num_rows, dim = latents.shape
        scaled = (latents / variance).contiguous()
        codebook = codebook.contiguous()
        biases = codebook.square().sum(1) / (2 * variance)
        quantized = torch.empty_like(scaled)
        indices = torch.empty(num_rows, dtype=torch.int64, device=latents.device)
        entropies, statistics = scaled.new_empty(num_rows), scaled.new_empty(4, num_rows)
        sizes = tile_sizes(dim)
        with _current(scaled.device):
            _forward[(triton.cdiv(num_rows, sizes["BLOCK_N"]),)](
                scaled, codebook, biases, quantized, indices, entropies, statistics,
                seed, 1 / temperature, num_rows, len(codebook), dim, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(scaled, codebook, variance, biases, quantized, entropies, statistics)
        ctx.temperature, ctx.seed = temperature, seed
        ctx.mark_non_differentiable(indices)
        return quantized, indices, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_quantized: Tensor, _: Any, grad_entropies: Tensor
    ) -> tuple[Tensor | None, ...]:
        """As in `tokenizer/quantizers/mixture.py`."""
        scaled, codebook, variance, biases, quantized, entropies, statistics = ctx.saved_tensors
        (num_rows, dim), num_codes = scaled.shape, len(codebook)
        grad_quantized, grad_entropies = grad_quantized.contiguous(), grad_entropies.contiguous()
        inputs = (
            scaled, codebook, biases, grad_quantized, entropies, statistics, grad_entropies,
            torch.linalg.vecdot(grad_quantized, quantized),
        )  # fmt: skip
        settings = (ctx.seed, 1 / ctx.temperature, num_rows, num_codes, dim)
        sizes = tile_sizes(dim)
        grad_scaled, moments = torch.empty_like(scaled), torch.empty_like(entropies)
        with _current(scaled.device):
            _backward_latents[(triton.cdiv(num_rows, sizes["BLOCK_N"]),)](
                *inputs, grad_scaled, moments, *settings, **sizes
            )
        num_tiles = triton.cdiv(num_codes, sizes["BLOCK_K"])
        rows_per_share = triton.cdiv(num_rows, max(1, NUM_PROGRAMS // num_tiles))
        rows_per_share = triton.cdiv(rows_per_share, sizes["BLOCK_N"]) * sizes["BLOCK_N"]
        num_shares = triton.cdiv(num_rows, rows_per_share)
        parts = scaled.new_empty(num_shares, num_codes, dim)
        totals = scaled.new_empty(num_shares, num_codes)
        with _current(scaled.device):
            _backward_codebook[(num_tiles, num_shares)](
                *inputs, parts, totals, *settings, rows_per_share, **sizes
            )
        grad_codebook = parts.sum(0) - totals.sum(0).unsqueeze(1) * codebook / variance
        return grad_scaled / variance, grad_codebook, -moments.sum() / variance, None, None
