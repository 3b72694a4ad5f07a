"""The fast versions of stochastic quantization against the plain one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenizer.quantizers import mixture as quantization
from tokenizer.quantizers.base import Draw
from tokenizer.quantizers.mixture import (
    gumbel_noise,
    nearest_codes,
    plain_mixture,
    stochastic_quantization,
)

TEMPERATURE = 0.6


def random_inputs(
    positions: int, codes: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, codebook and variance that want a gradient."""
    shapes = ((positions, dim), (codes, dim))
    latents, codebook = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return latents, codebook, torch.tensor(1.7, dtype=dtype, requires_grad=True)


def gradients(draw: Draw, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a random function of what was drawn; the same at each call for the same shapes."""
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor)
        for tensor in (draw.quantized, draw.posterior_entropy)
    ]
    loss = (weights[0] * draw.quantized).sum() + (weights[1] * draw.posterior_entropy).sum()
    return torch.autograd.grad(loss, inputs)


def quantized_twice(inputs: tuple[Tensor, Tensor, Tensor], seed: int = 3) -> tuple[Draw, Draw]:
    """By the fast version and by the plain one, with the same noise."""
    fast = stochastic_quantization(
        *inputs, TEMPERATURE, "mixture", torch.Generator().manual_seed(seed)
    )
    noise = quantization.draw_seed(torch.Generator().manual_seed(seed))
    latents, codebook, _ = inputs
    return fast, plain_mixture(*inputs, TEMPERATURE, gumbel_noise(latents, codebook, noise))


@settings(max_examples=40)
@given(
    positions=st.integers(1, 30),
    codes=st.integers(1, 12),
    block=st.sampled_from([1, 7, 50, 10_000]),
    keeps=st.booleans(),
)
def test_blocks_give_what_whole_matrices_give(
    positions: int, codes: int, block: int, keeps: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantization.BLOCK_SIZE, "cpu", block)
        patch.setattr(quantization, "KEPT_SIZE", 2**20 if keeps else 0)
        inputs = random_inputs(positions, codes, 3)
        fast, plain = quantized_twice(inputs)
        assert torch.equal(fast.indices, plain.indices)
        found = [fast.quantized, fast.posterior_entropy, *gradients(fast, inputs)]
        expected = [plain.quantized, plain.posterior_entropy, *gradients(plain, inputs)]
        nearest = nearest_codes(*inputs[:2])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(nearest, torch.cdist(*inputs[:2]).argmin(1))


def test_in_float32_many_codes_differ_from_whole_matrices_by_rounding_alone() -> None:
    inputs = random_inputs(700, 1024, 64, torch.float32)  # several blocks
    fast, plain = quantized_twice(inputs)
    torch.testing.assert_close(fast.quantized, plain.quantized, rtol=1e-4, atol=1e-5)
    for own, other in zip(gradients(fast, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("mode", ["mixture", "sample"])
def test_no_matrix_of_all_positions_and_codes_is_made(mode: str) -> None:
    latents, codebook, variance = random_inputs(3_000, 4_096, 8, torch.float32)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    quantizing = torch.enable_grad() if mode == "mixture" else torch.no_grad()
    with pytest.MonkeyPatch.context() as patch, quantizing, Sizes():
        patch.setattr(quantization, "KEPT_SIZE", 0)
        draw = stochastic_quantization(latents, codebook, variance, TEMPERATURE, mode)  # type: ignore[arg-type]
        if mode == "mixture":
            draw.quantized.sum().backward()
    assert 0 < largest <= quantization.BLOCK_SIZE["cpu"]


@pytest.mark.parametrize(("kept_size", "is_kept"), [(30 * 12, True), (30 * 12 - 1, False)])
def test_small_matrices_alone_are_kept_for_backward(
    kept_size: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "KEPT_SIZE", kept_size)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    inputs = random_inputs(30, 12, 3, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stochastic_quantization(*inputs, TEMPERATURE, "mixture")
    assert (sum(saved) >= 2 * 30 * 12) == is_kept


def test_noise_of_different_blocks_is_different_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.BLOCK_SIZE, "cpu", 400)
    latents, codebook, _ = random_inputs(400, 4, 2, torch.float32)
    noise = gumbel_noise(latents, codebook, 11)
    assert noise.isfinite().all()
    for first, second in itertools.combinations(noise.split(100), 2):
        assert not torch.equal(first, second)
    # Mean of the Gumbel distribution: Euler's constant.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.15)
