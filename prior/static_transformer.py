"""One token after another through a trained transformer, with a cache of fixed size."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.structure import NAMES, check_structure

# Gains of norms, 1 / norm, softmax and rotation are those of x-transformers' `Decoder` as
# `prior.layers.transformer` builds it; the tests compare the two.
SMALLEST_NORM = 1e-12


class Linear:
    """A linear map over few rows, which is bound by reading its weight.

    Weights on a CPU are stored in oneDNN's blocked layout: twice as fast or more for up to some
    dozen rows, bfloat16 another twice where the processor multiplies it, and a row's result is the
    same bit for bit among any number of rows from `LEAST_ROWS` on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._is_blocked = (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and torch._C._has_mkldnn
        )
        self._bias = bias
        self._weight = weight
        if self._is_blocked:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def __call__(self, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        """The map, (..., in) to (..., out), plus `residual`."""
        result: Tensor
        if not self._is_blocked:
            result = nn.functional.linear(inputs, self._weight, self._bias)
            return result if residual is None else result.add_(residual)
        operation = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            result = operation(inputs, self._weight, self._bias, "none", [], "")
        else:
            result = operation.binary(inputs, residual, self._weight, self._bias, "add")
        return result


LEAST_ROWS = 2
"""A single row goes through another kernel of oneDNN, with other last bits."""


class _Layer(NamedTuple):
    """Weights and cache of an attention and a feed-forward layer."""

    to_heads: Linear
    """Queries, keys, values and, behind them, how much of the values are the layer's own."""
    gains: Tensor  # (2, heads, dim) of queries and keys, with the scale of attention
    from_heads: Linear
    to_gates: Linear
    from_gates: Linear
    keys: Tensor  # (B, heads, length, dim), rotated
    values: Tensor


class StaticTransformer:
    """A causal transformer of `prior.layers.transformer` in evaluation mode, input by input.

    Gains of norms are multiplied into the weights that follow them, queries, keys and values come
    from one product, and keys are rotated when they are stored: the results equal those of the
    module up to rounding. Weights are read at construction.

    Args:
        module: The transformer.
        rows: Number of sequences.
        length: Most inputs of a sequence.
        angles: Rotary angles (1, length, head_dim), None without.

    Raises:
        InputError: this version of x-transformers builds another structure.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: int,
        length: int,
        angles: Float[Tensor, "1 length angles"] | None = None,
    ) -> None:
        check_structure(module)
        decoder: Any = module.attn_layers
        pairs = list(zip(decoder.layers[::2], decoder.layers[1::2], strict=True))
        self._layers = [_layer(*pair, rows, length) for pair in pairs]
        self._has_value_residual = decoder.add_value_residual
        norms = [*(layer[0][0] for layer in decoder.layers), decoder.final_norm]
        self._gains: Tensor | None = None
        if decoder.norm_need_condition:
            weight = torch.cat([norm.to_gamma.weight for norm in norms])
            self._to_gains = Linear(weight, None, rows)
            self._gains = weight.new_ones(len(norms), rows, 1, weight.shape[1])
        self._rotation = None
        if angles is not None:
            # Pairs of channels turn together: a complex product with e^(i angle).
            turns = angles[0, :, None, None, ::2]
            self._rotation = torch.polar(torch.ones_like(turns), turns)
        self.gain = _gain(decoder.final_norm)
        """Scales the results, channel by channel."""

    def condition(self, vectors: Float[Tensor, "rows width"]) -> None:
        """Takes what the norms are scaled by, if they are, in the same memory."""
        if self._gains is not None:
            rows = len(vectors)
            gains = self._to_gains(vectors).add_(1).view(rows, len(self._gains), 1, -1)
            self._gains.copy_(gains.transpose(0, 1))

    def __call__(
        self, inputs: Float[Tensor, "rows new width"], first: int
    ) -> Float[Tensor, "rows new width"]:
        """Takes the inputs first, first + 1, ...; all before them must have been taken.

        Returns the outputs before the gain of the last norm, which is left to the caller.
        """
        hidden, first_values = inputs, None
        for number, layer in enumerate(self._layers):
            heads = layer.to_heads(self._normed(hidden, 2 * number))
            mixed, values = self._attend(layer, heads, first, first_values)
            first_values = first_values if first_values is not None else values
            hidden = layer.from_heads(mixed, hidden)
            gated, gates = layer.to_gates(self._normed(hidden, 2 * number + 1)).chunk(2, dim=-1)
            hidden = layer.from_gates(nn.functional.silu(gates).mul_(gated), hidden)
        return self._normed(hidden, -1)

    def reorder(self, rows: Int[Tensor, " kept"], length: int) -> None:
        """Puts these rows of the cache, of `length` inputs, in place of the first ones."""
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[: len(rows), :, :length] = cache[rows, :, :length]

    def _normed(self, vectors: Tensor, number: int) -> Tensor:
        """Unit vectors, scaled where a condition says how."""
        normalized = _normalized(vectors)
        return normalized if self._gains is None else normalized.mul_(self._gains[number])

    def _attend(
        self, layer: _Layer, heads: Tensor, first: int, first_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the heads gather, and the values of these inputs, (rows, new, heads, dim)."""
        num_heads, dim = layer.gains.shape[1:]
        rows, new, width = *heads.shape[:2], num_heads * dim
        last = first + new
        shares = heads[:, :, 3 * width :]
        heads = heads[:, :, : 3 * width].view(rows, new, 3, num_heads, dim)
        values = heads[:, :, 2]
        if self._has_value_residual and first_values is not None:
            values = torch.lerp(first_values, values, shares.sigmoid().unsqueeze(-1))
        layer.values[:, :, first:last] = values.transpose(1, 2)
        turned = self._turned(_normalized(heads[:, :, :2]).mul_(layer.gains), first)
        layer.keys[:, :, first:last] = turned[:, :, 1].transpose(1, 2)
        if last == 1:  # a single key has all the weight
            return values.flatten(2), values
        queries = turned[:, :, 0].transpose(1, 2)
        mixed = _mixed(queries, layer.keys[:, :, :last], layer.values[:, :, :last])
        return mixed.transpose(1, 2).reshape(rows, new, width), values

    def _turned(self, heads: Tensor, first: int) -> Tensor:
        """Rotates (B, new, 2, heads, dim) by the angles of their places."""
        if self._rotation is None:
            return heads
        whole = heads.to(self._rotation.real.dtype)  # there are no complex numbers of 16 bits
        pairs = torch.view_as_complex(whole.view(*heads.shape[:-1], -1, 2))
        turned = pairs * self._rotation[first : first + heads.shape[1]]
        return torch.view_as_real(turned).flatten(-2).to(heads.dtype)


def _mixed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention (B, heads, new, dim) of the newest of all inputs, whose scale is 1."""
    new, last = queries.shape[2], keys.shape[2]
    mask = None
    if new > 1:
        mask = torch.ones(new, last, dtype=torch.bool, device=keys.device).tril(last - new)
    if keys.device.type == "cuda":  # only on a GPU
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=1.0
        )
    # On a CPU that function is no faster, and an image's last bits depend on its thread.
    weights = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        weights.masked_fill_(~mask, -math.inf)
    mixed = torch.bmm(weights.softmax(-1), values.flatten(0, 1))
    return mixed.view(queries.shape)


def _layer(attention: Any, feed_forward: Any, rows: int, length: int) -> _Layer:
    """Reads a pair of x-transformers' layers: (norms, module, residual) each."""
    inner, gated = attention[1], feed_forward[1].ff
    weight = torch.cat([getattr(inner, f"to_{name}").weight for name in NAMES])
    bias = None
    if isinstance(inner.to_value_residual_mix, nn.Sequential):
        mix: Any = inner.to_value_residual_mix[0]
        bias = torch.cat([weight.new_zeros(len(weight)), mix.bias])
        weight = torch.cat([weight, mix.weight])
    gains = torch.stack([1 + norm.gamma.squeeze(1) for norm in (inner.q_rmsnorm, inner.k_rmsnorm)])
    _, num_heads, dim = gains.shape
    cache = [weight.new_zeros(rows, num_heads, length, dim) for _ in range(2)]
    to_gates = gated[0].proj
    is_linear = isinstance(inner.to_out, nn.Linear)  # x-transformers spares it for a single head
    from_heads = inner.to_out.weight if is_linear else torch.eye(dim).to(weight)
    return _Layer(
        to_heads=Linear(weight * _gain(attention[0][0]), bias, rows),
        gains=gains * gains.new_tensor([1.0, math.sqrt(dim)]).view(2, 1, 1),
        from_heads=Linear(from_heads, None, rows),
        to_gates=Linear(to_gates.weight * _gain(feed_forward[0][0]), to_gates.bias, rows),
        from_gates=Linear(gated[2].weight, gated[2].bias, rows),
        keys=cache[0],
        values=cache[1],
    )


def _gain(norm: Any) -> Tensor:
    """What an RMSNorm multiplies unit vectors by, whatever the condition."""
    gain: Tensor
    if hasattr(norm, "to_gamma"):
        gain = norm.to_gamma.weight.new_full((len(norm.to_gamma.weight),), norm.scale)
        return gain
    gain = (norm.g + float(norm.unit_offset)) * norm.scale
    return gain


def _normalized(vectors: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    normalized: Tensor = vectors / norms.clamp_min_(SMALLEST_NORM)
    return normalized
