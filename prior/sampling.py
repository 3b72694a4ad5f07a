"""Drawing code indices from a prior."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from prior.config import MAX_GUIDANCE
from prior.cuda_graphs import Recording
from prior.incremental_decoder import PriorCache
from prior.logits_filter import (
    FloatPerLayer,
    OptionalFloatPerLayer,
    OptionalIntPerLayer,
    draw,
    filter_logits,
    settings_per_layer,
)
from prior.transformer import Prior
from tokenizer.storage.errors import InputError


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


class Sampler:
    """Draws the code indices of images, batch after batch.

    The prior's weights are read at the first batch of a size: they must not change meanwhile. On a
    GPU the second batch of a size is recorded, and all that follow are replayed without the host's
    part of the work. So give it batches of one size.

    Args:
        prior: The prior, in evaluation mode.
        temperature: Divides the logits.
        top_k: Keeps this many most probable codes; None keeps all.
        top_p: Keeps the most probable codes up to this total probability; None keeps all.
        guidance_scale: Weight w of classifier-free guidance (arXiv 2207.12598): logits are
            null + w (conditional - null); 1 is off, any other value doubles the work.

    Raises:
        InputError: a setting is out of range, or the prior is in training mode.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        temperature: FloatPerLayer = 1.0,
        top_k: OptionalIntPerLayer = None,
        top_p: OptionalFloatPerLayer = None,
        guidance_scale: float = 1.0,
    ) -> None:
        prior.check_evaluation()
        self._prior = prior
        self._settings = settings_per_layer(temperature, top_k, top_p, prior.config.codebook_sizes)
        self._guidance_scale = guidance_scale
        self._cache: PriorCache | None = None
        self._recording: Recording | None = None

    def __call__(
        self,
        labels: Tensor | None,
        generators: Sequence[torch.Generator],
        *,
        known: Sequence[Tensor] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Int[Tensor, "batch _depth _height _width"]]:
        """Draws one image per generator.

        An image depends on its generator, label and known codes alone, not on the batch or the
        process it is drawn in: bit for bit on a CPU, up to the rounding of sums on a GPU.

        Args:
            labels: Classes (B,), int64; None for an unconditional prior, or for the null class.
            generators: One CPU generator per image, see `sample_generators`.
            known: Codes to keep, shaped like the result; -1 where one is to be drawn. A draw
                depends on earlier codes only: this is exact conditioning where the known codes
                come first.
            progress: Is told the number of finished steps.

        Raises:
            InputError: an argument does not fit the prior.
        """
        prior, ordering, batch = self._prior, self._prior.ordering, len(generators)
        device = prior.start.device
        cache_labels = _cache_labels(prior, labels, batch, self._guidance_scale).to(device)
        codes = ordering.flatten(_check_known(prior, known, batch))
        uniforms = _uniforms(generators, ordering.num_steps * ordering.num_slots)
        uniforms = uniforms.to(device).view_as(codes)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            is_fresh = self._start(cache_labels)
            if device.type == "cuda" and known is None and not is_fresh:  # only on a GPU
                if self._recording is None:
                    self._recording = Recording(ordering, self._draw_step, codes, uniforms)
                codes = self._recording.replay(codes, uniforms, progress)
            else:
                is_drawn = (codes < 0).any(0).tolist()  # read once, not once per code
                for step in range(ordering.num_steps):
                    self._draw_step(step, codes, uniforms, is_drawn[step])
                    if progress is not None:
                        progress(step + 1)
        return ordering.unflatten(codes)

    def _start(self, cache_labels: Tensor) -> bool:
        """Begins new images; says whether memory had to be taken for them."""
        if self._cache is not None and self._cache.batch == len(cache_labels):
            self._cache.restart(cache_labels)
            return False
        self._recording = self._cache = None  # frees their memory first
        self._cache = PriorCache(self._prior, cache_labels)
        return True

    def _draw_step(
        self, step: int, codes: Tensor, uniforms: Tensor, is_drawn: Sequence[bool]
    ) -> None:
        """Fills one step of `codes` (B, steps, slots) where they are negative."""
        cache, is_guided = self._cache, self._guidance_scale != 1
        assert cache is not None
        for slot in range(len(self._prior.ordering.steps[step])):
            chosen = codes[:, step, slot]
            if is_drawn[slot]:
                logits = cache.next_logits().double()
                if is_guided:
                    logits, null_logits = logits.chunk(2)
                    logits = null_logits + self._guidance_scale * (logits - null_logits)
                logits = filter_logits(logits, *self._settings[cache.layer])
                drawn = draw(logits, uniforms[:, step, slot])
                chosen = torch.where(chosen < 0, drawn, chosen)
                codes[:, step, slot] = chosen
            cache.append(chosen.repeat(2) if is_guided else chosen)


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
    """Draws the code indices of one image per generator, in one batch.

    Arguments and errors are those of `Sampler` and of its call.
    """
    sampler = Sampler(
        prior,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
    )
    return sampler(labels, generators, known=known, progress=progress)


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
