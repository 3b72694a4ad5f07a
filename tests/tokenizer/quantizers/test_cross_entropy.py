"""The cross entropy of posteriors and a prior in blocks against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.quantizers.test_interface import make_quantizer
from tokenizer.quantizers import Quantizer
from tokenizer.quantizers import mixture as quantization
from tokenizer.quantizers.base import CrossEntropy


@settings(max_examples=25)
@given(
    positions=st.integers(0, 30),
    layer=st.integers(0, 1),
    block=st.sampled_from([1, 40, 10_000]),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_blocks_give_what_whole_matrices_give(
    positions: int, layer: int, block: int, weights: tuple[float, float]
) -> None:
    quantizer = make_quantizer("stochastic")
    head = torch.nn.Linear(5, 12).double()
    residual = (3 + torch.randn(positions, 3).double()).requires_grad_()
    features = torch.randn(positions, 5).double().requires_grad_()

    def gradients(found: CrossEntropy) -> tuple[torch.Tensor, ...]:
        inputs = (residual, features, *quantizer.parameters(), *head.parameters())
        loss = weights[0] * found.rate + weights[1] * found.fit
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantization.BLOCK_SIZE, "cpu", block)
        fast = quantizer.cross_entropy(layer, residual, features, head)
    plain = Quantizer.cross_entropy(quantizer, layer, residual, features, head)
    found = [*fast, *gradients(fast)]
    torch.testing.assert_close(found, [*plain, *gradients(plain)], rtol=1e-9, atol=1e-9)


def test_no_matrix_of_all_positions_and_codes_is_made_or_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(quantization.BLOCK_SIZE, "cpu", 12 * 10)
    quantizer, head = make_quantizer("stochastic"), torch.nn.Linear(5, 12).double()
    residual = torch.randn(100, 3).double().requires_grad_()
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = quantizer.cross_entropy(0, residual, torch.randn(100, 5).double(), head)
    assert found.rate.requires_grad
    assert 0 < max(saved) <= 100 * 5 < 100 * 12
