"""From logits to a code: temperature, top-k, top-p, the draw itself."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tokenizer.fields import MAX_TEMPERATURE, MIN_TEMPERATURE
from tokenizer.storage.errors import InputError

ValueT = TypeVar("ValueT")
KINDS = {
    "temperature": (float, int),
    "top_k": (int, type(None)),
    "top_p": (float, int, type(None)),
}
# One value for all layers, or one per layer over all groups, coarse to fine.
FloatPerLayer = float | Sequence[float]
OptionalFloatPerLayer = float | Sequence[float | None] | None
OptionalIntPerLayer = int | Sequence[int | None] | None


def filter_logits(
    logits: Float[Tensor, "*batch codes"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*batch codes"]:
    """Logits over `temperature`, -inf where `top_k` or then `top_p` rules a code out.

    top_p keeps the smallest set of most probable codes that holds at least this probability.
    Among equals the lower index counts as the more probable code.
    """
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    is_kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        is_kept[..., top_k:] = False
    if top_p is not None:
        probabilities = ordered.masked_fill(~is_kept, -math.inf).softmax(-1)
        is_kept &= probabilities.cumsum(-1) - probabilities < top_p
    return logits.masked_fill(~is_kept.scatter(-1, order, is_kept), -math.inf)


def draw(
    logits: Float64[Tensor, "batch codes"], uniforms: Float64[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """Codes by inverse cumulative distribution; `uniforms` lie in [0, 1)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # Dividing makes the end exactly 1, so that codes of probability 0 are never drawn.
    return (cumulative / cumulative[:, -1:] <= uniforms.unsqueeze(1)).sum(-1)


def settings_per_layer(
    temperature: FloatPerLayer,
    top_k: OptionalIntPerLayer,
    top_p: OptionalFloatPerLayer,
    sizes: list[int],
) -> list[tuple[float, int | None, float | None]]:
    """Temperature, top_k and top_p of each layer.

    Raises:
        InputError: one is out of range, or there are too few or too many values.
    """
    settings = list(
        zip(
            _per_layer("temperature", temperature, len(sizes)),
            _per_layer("top_k", top_k, len(sizes)),
            _per_layer("top_p", top_p, len(sizes)),
            strict=True,
        )
    )
    for values, size in zip(settings, sizes, strict=True):
        for (name, kinds), value in zip(KINDS.items(), values, strict=True):
            if not isinstance(value, kinds):
                raise InputError(f"{name} must be a number, or one per layer, got {value!r}")
        layer_temperature, layer_top_k, layer_top_p = values
        if not MIN_TEMPERATURE <= layer_temperature <= MAX_TEMPERATURE:
            raise InputError(
                f"temperature must be > 0, from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, "
                f"got {layer_temperature}"
            )
        if layer_top_k is not None and not 1 <= layer_top_k <= size:
            raise InputError(f"top_k must lie in [1, {size}], got {layer_top_k}")
        if layer_top_p is not None and not 0 < layer_top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {layer_top_p}")
    return settings


def _per_layer(name: str, value: ValueT | Sequence[ValueT], num_layers: int) -> list[ValueT]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * num_layers
    if len(value) != num_layers:
        raise InputError(f"{name} must hold {num_layers} values, one per layer, got {len(value)}")
    return list(value)
