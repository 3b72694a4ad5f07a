"""CE(P, p) of posteriors P over codes and a prior p, in blocks of rows.

P = softmax_k(-‖ẑ - b_k‖² / 2s²) and p = softmax(features · weightᵀ + bias) are N × K matrices; the
cross entropy is a number, and so its gradient is computed with it, block by block, and neither
matrix is kept or computed twice. The contexts of p hold drawn codes, so that this comes after the
mixture. `plain_cross_entropy` in `base.py` is the same with whole
matrices, for reading and for tests.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer.quantizers.base import CrossEntropy
from tokenizer.quantizers.mixture import code_biases, proximity, row_blocks


def blocked_cross_entropy(
    latents: Float[Tensor, "positions dim"],
    codebook: Float[Tensor, "codes dim"],
    variance: Float[Tensor, ""],
    features: Float[Tensor, "positions width"],
    weight: Float[Tensor, "codes width"],
    bias: Float[Tensor, " codes"],
) -> CrossEntropy:
    """In blocks of rows, on any device; arguments as in the formulas above, all of one type."""
    of_posterior, of_prior = (latents, codebook, variance), (features, weight, bias)
    with torch.no_grad():
        length, *gradients = _with_gradients(*of_posterior, *of_prior)
    return CrossEntropy(
        _Differentiated.apply(length, gradients[:3], *of_posterior),
        _Differentiated.apply(length, gradients[3:], *of_prior),
    )


class _Differentiated(torch.autograd.Function):
    """A number whose gradient with respect to `inputs` is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(own * grad for own in ctx.saved_tensors)


def _with_gradients(
    latents: Tensor,
    codebook: Tensor,
    variance: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, ...]:
    """The cross entropy, and its gradient with respect to each input.

    With a = log P up to a constant, ∂CE/∂a = -P (log p + CE) and ∂CE/∂logits = p - P. The first
    sums to zero over k, so that constants in a have no gradient.
    """
    precision = 1 / variance
    biases = code_biases(codebook, precision)
    total, grad_variance = torch.zeros_like(variance), torch.zeros_like(variance)
    grad_latents, grad_features = torch.empty_like(latents), torch.empty_like(features)
    grad_codebook, grad_weight = torch.zeros_like(codebook), torch.zeros_like(weight)
    totals, grad_bias = torch.zeros_like(biases), torch.zeros_like(bias)
    for _, rows in row_blocks(latents, codebook):
        log_posterior = proximity(latents[rows], codebook, precision, biases).log_softmax(1)
        log_prior = torch.addmm(bias, features[rows], weight.T).log_softmax(1)
        posterior = log_posterior.exp()
        lengths = -torch.linalg.vecdot(posterior, log_prior)  # CE of each row
        total += lengths.sum()
        grad = log_prior.exp().sub_(posterior)  # of the prior's logits
        torch.mm(grad, weight, out=grad_features[rows])
        grad_weight.addmm_(grad.T, features[rows])
        grad_bias += grad.sum(0)
        grad = log_prior.add_(lengths.unsqueeze(1)).mul_(posterior).neg_()  # of a
        torch.mm(grad, codebook, out=grad_latents[rows])
        grad_codebook.addmm_(grad.T, latents[rows])
        totals += grad.sum(0)
        grad_variance -= torch.linalg.vecdot(grad, log_posterior).sum()
    grad_codebook -= totals.unsqueeze(1) * codebook
    of_posterior = (own * precision for own in (grad_latents, grad_codebook, grad_variance))
    return total, *of_posterior, grad_features, grad_weight, grad_bias
