"""Drawing code indices from a prior."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from prior.cache import PriorCache
from prior.config import MAX_GUIDANCE
from prior.transformer import Prior
from tokenizer.config import MAX_TEMPERATURE, MIN_TEMPERATURE
from tokenizer.pretrained import InputError

ValueT = TypeVar("ValueT")
# One value for all layers, or one per layer over all groups, coarse to fine.
FloatPerLayer = float | Sequence[float]
OptionalFloatPerLayer = float | Sequence[float | None] | None
OptionalIntPerLayer = int | Sequence[int | None] | None


def sample_generators(seed: int, sample_indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, a function of `seed` and that sample's index alone.

    Raises:
        InputError: seed or an index is negative.
    """
    generators = []
    for index in sample_indices:
        if seed < 0 or index < 0:
            raise InputError(f"seed and sample index must be >= 0, got {seed} and {index}")
        words = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
        # manual_seed takes the range of int64.
        generators.append(torch.Generator().manual_seed(int(words[0]) >> 1))
    return generators


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


def sample(
    prior: Prior,
    labels: Tensor | None,
    generators: Sequence[torch.Generator],
    *,
    temperature: FloatPerLayer = 1.0,
    top_k: OptionalIntPerLayer = None,
    top_p: OptionalFloatPerLayer = None,
    guidance_scale: float = 1.0,
    known: Sequence[Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Int[Tensor, "batch _depth _height _width"]]:
    """Draws the code indices of one image per generator.

    An image depends on its generator, label and known codes alone, up to the rounding of sums
    that batch size and device bring: not on the batch or the process it is drawn in.

    Args:
        prior: The prior, in evaluation mode.
        labels: Classes (B,), int64; None for an unconditional prior, or for the null class.
        generators: One CPU generator per image, see `sample_generators`.
        temperature: Divides the logits.
        top_k: Keeps this many most probable codes; None keeps all.
        top_p: Keeps the most probable codes up to this total probability; None keeps all.
        guidance_scale: Weight w of classifier-free guidance (arXiv 2207.12598): logits are
            null + w (conditional - null); 1 is off, any other value doubles the work.
        known: Codes to keep, shaped like the result; -1 where one is to be drawn. A draw depends
            on earlier codes only: this is exact conditioning where the known codes come first.
        progress: Is told the number of finished steps.

    Raises:
        InputError: a setting is out of range, or an argument does not fit the prior.
    """
    prior.check_evaluation()
    settings = settings_per_layer(temperature, top_k, top_p, prior.config.codebook_sizes)
    batch, device, ordering = len(generators), prior.start.device, prior.ordering
    cache_labels = _cache_labels(prior, labels, batch, guidance_scale).to(device)
    is_guided = guidance_scale != 1
    codes = ordering.flatten(_check_known(prior, known, batch))
    is_drawn = (codes < 0).any(0).tolist()  # read once, not once per code
    uniforms = _uniforms(generators, ordering.num_steps * ordering.num_slots)
    uniforms = uniforms.to(device).view_as(codes)
    depths = [code_map.depth for code_map in ordering.code_maps]
    with torch.inference_mode():
        cache = PriorCache(prior, cache_labels)
        for step, slot_types in enumerate(ordering.steps):
            for slot, slot_type in enumerate(slot_types):
                chosen = codes[:, step, slot]
                if is_drawn[step][slot]:
                    logits = cache.next_logits().double()
                    if is_guided:
                        logits, null_logits = logits.chunk(2)
                        logits = null_logits + guidance_scale * (logits - null_logits)
                    layer = sum(depths[: slot_type.group]) + slot_type.layer
                    logits = filter_logits(logits, *settings[layer])
                    drawn = draw(logits, uniforms[:, step, slot])
                    chosen = torch.where(chosen < 0, drawn, chosen)
                    codes[:, step, slot] = chosen
                cache.append(chosen.repeat(2) if is_guided else chosen)
            if progress is not None:
                progress(step + 1)
    return ordering.unflatten(codes)


def _uniforms(generators: Sequence[torch.Generator], number: int) -> Tensor:
    """(B, number), all of an image's at once, so that known codes do not shift the others."""
    if not generators:
        raise InputError("generators must hold one generator per image, got none")
    for generator in generators:
        if generator.device.type != "cpu":
            raise InputError(f"generators must be on the CPU, got one on {generator.device}")
    return torch.stack([torch.rand(number, generator=g, dtype=torch.float64) for g in generators])


def _check_known(prior: Prior, known: Sequence[Tensor] | None, batch: int) -> list[Tensor]:
    device, ordering = prior.start.device, prior.ordering
    if known is None:
        return [
            torch.full((batch, m.depth, m.height, m.width), -1, device=device)
            for m in ordering.code_maps
        ]
    ordering.check(known, "known", allows_unknown=True)
    if len(known[0]) != batch:
        raise InputError(f"known must hold {batch} images, as generators, got {len(known[0])}")
    return [tensor.to(device) for tensor in known]


def check_guidance(prior: Prior, has_labels: bool, guidance_scale: float) -> None:
    """Whether the prior can be guided so.

    Raises:
        InputError: the scale is out of range, or there is no null class.
    """
    if not 0 <= guidance_scale <= MAX_GUIDANCE:
        raise InputError(f"guidance_scale must lie in [0, {MAX_GUIDANCE}], got {guidance_scale}")
    uses_null = not has_labels or guidance_scale != 1
    if prior.config.num_classes and uses_null and not prior.config.network.label_dropout:
        field = "guidance_scale" if has_labels else "labels"
        raise InputError(f"{field}: this prior was trained without label_dropout: no null class")
    if guidance_scale != 1 and not has_labels:
        raise InputError(f"guidance_scale must be 1 without labels, got {guidance_scale}")


def _cache_labels(prior: Prior, labels: Tensor | None, batch: int, guidance_scale: float) -> Tensor:
    """Labels of the images, and behind them null labels if there is guidance."""
    check_guidance(prior, labels is not None, guidance_scale)
    null_labels = torch.full((batch,), prior.config.num_classes)
    if labels is None:
        return null_labels
    prior.check_labels(labels, batch)
    return labels if guidance_scale == 1 else torch.cat([labels, null_labels.to(labels)])


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
    for (layer_temperature, layer_top_k, layer_top_p), size in zip(settings, sizes, strict=True):
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
    if not isinstance(value, Sequence):
        return [value] * num_layers
    if len(value) != num_layers:
        raise InputError(f"{name} must hold {num_layers} values, one per layer, got {len(value)}")
    return list(value)
