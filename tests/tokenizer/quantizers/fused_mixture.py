"""Holds the fused kernels against whole matrices; run as a module on a CPU.

Without a GPU, triton's interpreter runs them: TRITON_INTERPRET=1 must be set before triton is
imported, so that this is a program of its own.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.tokenizer.quantizers.test_mixture import gradients
from tokenizer.quantizers.mixture import plain_mixture
from tokenizer.quantizers.mixture_triton import _gumbel, _store_rows, fused_mixture

TEMPERATURE, SEED = 0.6, 2**61 + 12_345


@triton.jit(do_not_specialize=["seed"])
@no_type_check
def _noise_strip(strip, seed, start, num_rows):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    _store_rows(strip, _gumbel(seed, rows, start, 16), rows, num_rows, 16, 16)


def fused_noise(num_rows: int, num_codes: int, seed: int, device: torch.device) -> Tensor:
    """The noise (N, K) that `fused_mixture` adds, a strip of 16 codes at a time."""
    noise = torch.empty(num_rows, num_codes, device=device)
    for start in range(0, num_codes, 16):
        strip = torch.empty(num_rows, 16, device=device)
        _noise_strip[(triton.cdiv(num_rows, 16),)](strip, seed, start, num_rows)
        noise[:, start : start + 16] = strip[:, : num_codes - start]
    return noise


def check(positions: int, codes: int, dim: int, device: torch.device) -> None:
    """Values, gradients and choices are those of `plain_mixture` with the kernels' noise."""
    torch.manual_seed(0)
    shapes = ((positions, dim), (codes, dim))
    latents, codebook = (torch.randn(*shape, device=device).requires_grad_() for shape in shapes)
    inputs = (latents, codebook, torch.tensor(1.7, device=device).requires_grad_())
    noise = fused_noise(positions, codes, SEED, device)
    fused = fused_mixture(*inputs, TEMPERATURE, SEED)
    plain = plain_mixture(*inputs, TEMPERATURE, noise)
    assert (fused.indices == plain.indices).double().mean() > 0.999  # near ties
    found = [fused.quantized, fused.posterior_entropy, *gradients(fused, inputs)]
    expected = [plain.quantized, plain.posterior_entropy, *gradients(plain, inputs)]
    for own, other in zip(found, expected, strict=True):
        largest = max(other.abs().max().item(), 1e-2)  # with one code gradients are zero
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * largest)


def check_small_variance(device: torch.device) -> None:
    """Where the posterior is sharp: nearly as close to float64 as whole matrices in float32."""
    torch.manual_seed(1)
    variance = 1e-3
    codebook = torch.randn(32, 24, device=device).repeat(2, 1)
    codebook[32:] += (variance / 24) ** 0.5 * torch.randn(32, 24, device=device)  # s apart
    latents = codebook.repeat(2, 1) + variance**0.5 * torch.randn(128, 24, device=device)
    noise = fused_noise(len(latents), len(codebook), SEED, device)
    weights = torch.randn(len(latents), 25, device=device)
    results = []
    for kind in ("exact", "plain", "fused"):
        dtype = torch.float64 if kind == "exact" else torch.float32
        tensors = (latents, codebook, torch.tensor(variance, device=device))
        inputs = tuple(own.to(dtype).detach().requires_grad_() for own in tensors)
        if kind == "fused":
            draw = fused_mixture(*inputs, TEMPERATURE, SEED)
        else:
            draw = plain_mixture(*inputs, TEMPERATURE, noise.to(dtype))
        drawn = torch.cat([draw.quantized, draw.posterior_entropy[:, None]], 1)
        found = torch.autograd.grad((weights.to(dtype) * drawn).sum(), inputs)
        results.append([draw.quantized, draw.posterior_entropy, *found])
    for exact, plain, fused in zip(*results, strict=True):
        plain_error, fused_error = ((own - exact).abs().max() for own in (plain, fused))
        assert fused_error < 8 * plain_error + 1e-5 * exact.abs().max(), (fused_error, plain_error)


def check_noise(device: torch.device) -> None:
    """Mean and variance of the Gumbel distribution; a position's noise is its own."""
    noise = fused_noise(200, 50, SEED, device)
    assert abs(noise.mean().item() - 0.5772) < 0.05
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.1
    assert torch.equal(noise[:30], fused_noise(30, 50, SEED, device))
    assert torch.equal(noise[:, :17], fused_noise(200, 17, SEED, device))
    assert not torch.equal(noise, fused_noise(200, 50, SEED + 1, device))
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()


if __name__ == "__main__":
    cpu = torch.device("cpu")
    for sizes in ((1, 1, 1), (70, 37, 5), (33, 64, 64)):
        check(*sizes, cpu)
    check_small_variance(cpu)
    check_noise(cpu)
