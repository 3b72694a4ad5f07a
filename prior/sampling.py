"""Drawing code indices from a prior."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prior.candidates import Candidates
from prior.conditioner import Condition, Tokens, concatenate
from prior.config import MAX_GUIDANCE
from prior.cuda_graphs import CapturedSteps
from prior.incremental_decoder import IncrementalDecoder
from prior.logits_filter import (
    FloatPerLayer,
    OptionalFloatPerLayer,
    OptionalIntPerLayer,
    draw,
    filter_logits,
    settings_per_layer,
)
from prior.ordering import CodeOrdering
from prior.transformer import Prior
from tokenizer.fields import check_whole
from tokenizer.storage.errors import InputError

NUM_CANDIDATES = 32
"""Completions that are weighed where known codes come after drawn ones."""


def sample_generators(seed: int, sample_indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, a function of `seed` and that sample's index alone.

    Raises:
        InputError: seed or an index is negative or not whole.
    """
    check_whole("seed", seed)
    generators = []
    for index in sample_indices:
        check_whole("sample index", index)
        words = np.random.SeedSequence([int(seed), int(index)]).generate_state(1, np.uint64)
        # manual_seed takes the range of int64.
        generators.append(torch.Generator().manual_seed(int(words[0]) >> 1))
    return generators


class Sampler:
    """Draws the code indices of images, batch after batch.

    Do not modify or move the prior while using it: its weights are read at the first batch of a
    size. On a GPU the second batch of a size is captured, and all that follow are replayed without
    the host's part of the work: give it batches of one size.

    Args:
        prior: The prior, in evaluation mode.
        temperature: Divides the logits.
        top_k: Keeps this many most probable codes; None keeps all.
        top_p: Keeps the most probable codes up to this total probability; None keeps all.
        guidance_scale: Weight w of classifier-free guidance (arXiv 2207.12598): logits are
            null + w (conditional - null); 1 is off, any other value doubles the work.

    Raises:
        InputError: a setting is out of range, the prior cannot be guided or is in training mode.
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
        if not 0 <= guidance_scale <= MAX_GUIDANCE:
            raise InputError(
                f"guidance_scale must lie in [0, {MAX_GUIDANCE}], got {guidance_scale}"
            )
        if guidance_scale != 1 and not prior.conditioner.has_null:
            raise InputError(
                "guidance_scale must be 1 for a prior without a null condition, as it is trained "
                f"by label_dropout, got {guidance_scale}"
            )
        self._prior = prior
        self._settings = settings_per_layer(temperature, top_k, top_p, prior.config.codebook_sizes)
        self._guidance_scale = guidance_scale
        self._decoder: IncrementalDecoder | None = None
        self._captured: CapturedSteps | None = None

    def check(self, inputs: Any, batch: int) -> None:
        """Checks the conditioner's inputs for `batch` images.

        Raises:
            InputError: they do not fit the prior, or are missing.
        """
        conditioner = self._prior.conditioner
        if inputs is not None:
            conditioner.check(inputs, batch)
        elif not conditioner.has_null:
            raise InputError(
                "labels or condition must be given for a prior without a null condition, as it is "
                "trained by label_dropout, got None"
            )
        elif self._guidance_scale != 1:
            raise InputError(
                f"guidance_scale must be 1 without labels or condition, got {self._guidance_scale}"
            )

    def weighs(self, known: Any, batch: int) -> bool:
        """Whether some known code of `batch` images comes after one that is to be drawn.

        Raises:
            InputError: the codes do not fit.
        """
        codes = self._prior.ordering.flatten(_check_known(self._prior, known, batch))
        return bool(_known_later(codes, self._prior.ordering).any())

    def __call__(
        self,
        inputs: Any,
        generators: Sequence[torch.Generator],
        *,
        known: Sequence[Tensor] | None = None,
        num_candidates: int = NUM_CANDIDATES,
        progress: Callable[[int], None] | None = None,
    ) -> list[Int[Tensor, "batch _depth _height _width"]]:
        """Draws one image per generator.

        An image depends on its generator, condition and known codes alone, not on the batch or the
        process it is drawn in: bit for bit on a CPU, up to the rounding of sums on a GPU.

        Args:
            inputs: What the prior's conditioner takes, a row per image: classes (B,), int64. None
                for an unconditional prior, or for the null condition.
            generators: One CPU generator per image, see `sample_generators`.
            known: Codes to keep, shaped like the result; -1 where one is to be drawn. Exact
                conditioning where the known codes come first, as a whole coarser map does in the
                coarse_to_fine order. Elsewhere an approximation of it, see `Candidates`, under
                temperature and guidance but not top_k and top_p.
            num_candidates: Of each image where known codes come after drawn ones: so many times
                the work and memory. With 1 a draw depends on earlier codes only.
            progress: Gets the number of finished steps after each.

        Raises:
            InputError: an argument does not fit the prior.
        """
        prior, ordering, batch = self._prior, self._prior.ordering, len(generators)
        device = prior.start.device
        self.check(inputs, batch)
        check_whole("num_candidates", num_candidates, 1)
        codes = ordering.flatten(_check_known(prior, known, batch))
        uniforms = _uniforms(generators, ordering.num_steps * ordering.num_slots)
        uniforms = uniforms.to(device).view_as(codes)
        candidates = None
        is_weighed = _known_later(codes, ordering)
        if known is not None and num_candidates > 1 and bool(is_weighed.any()):
            others = _uniforms(generators, (num_candidates - 1) * codes[0].numel()).to(device)
            others = others.view(batch, -1, *codes.shape[1:])
            uniforms = torch.cat([uniforms.unsqueeze(1), others], 1).flatten(0, 1)
            draws = _uniforms(generators, ordering.num_steps + 1).to(device)
            candidates = Candidates(is_weighed, num_candidates, draws)
            codes = codes.repeat_interleave(num_candidates, 0)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            condition = self._condition(inputs, batch)
            if candidates is not None:
                condition = condition.repeat_interleave(num_candidates)
            is_fresh = self._start(condition, len(codes))
            if device.type == "cuda" and known is None and not is_fresh:  # only on a GPU
                if self._captured is None:
                    self._captured = CapturedSteps(ordering, self._draw_step, codes, uniforms)
                codes = self._captured.replay(codes, uniforms, progress)
            else:
                is_drawn = (codes < 0).any(0).tolist()  # read once, not once per code
                for step in range(ordering.num_steps):
                    self._draw_step(step, codes, uniforms, is_drawn[step], candidates)
                    if progress is not None:
                        progress(step + 1)
        return ordering.unflatten(codes if candidates is None else codes[candidates.final()])

    def _condition(self, inputs: Any, batch: int) -> Condition:
        """Conditions of the images, and behind them null conditions if there is guidance."""
        prior, device = self._prior, self._prior.start.device
        # One by one on a CPU: the last bits of a product depend on the batch.
        size = 1 if device.type == "cpu" else batch
        starts = range(0, batch, size)
        if isinstance(inputs, Tensor | Tokens):
            inputs = inputs.to(device)
        conditions = []
        if inputs is not None:
            conditions = [prior.condition(inputs[i : i + size], size) for i in starts]
        if inputs is None or self._guidance_scale != 1:
            conditions += [prior.null_condition(size) for _ in starts]
        return concatenate(conditions)

    def _start(self, condition: Condition, batch: int) -> bool:
        """Begins new images; says whether memory had to be taken for them."""
        num_rows = batch if self._guidance_scale == 1 else 2 * batch
        if self._decoder is not None and self._decoder.batch == num_rows:
            self._decoder.restart(condition)
            return False
        self._captured = self._decoder = None  # frees their memory first
        self._decoder = IncrementalDecoder(self._prior, condition, num_rows)
        return True

    def _draw_step(
        self,
        step: int,
        codes: Tensor,
        uniforms: Tensor,
        is_drawn: Sequence[bool],
        candidates: Candidates | None = None,
    ) -> None:
        """Fills one step of `codes` (B, steps, slots) where they are negative."""
        decoder, is_guided = self._decoder, self._guidance_scale != 1
        assert decoder is not None
        for slot in range(len(self._prior.ordering.steps[step])):
            chosen = codes[:, step, slot]
            is_weighed = candidates is not None and candidates.is_weighed[step][slot]
            if is_drawn[slot] or is_weighed:
                logits = decoder.next_logits().double()
                if is_guided:
                    logits, null_logits = logits.chunk(2)
                    logits = null_logits + self._guidance_scale * (logits - null_logits)
                settings = self._settings[decoder.layer]
                if candidates is not None and is_weighed:
                    candidates.weigh(step, slot, logits / settings[0], chosen)
                logits = filter_logits(logits, *settings)
                drawn = draw(logits, uniforms[:, step, slot])
                chosen = torch.where(chosen < 0, drawn, chosen)
                codes[:, step, slot] = chosen
            decoder.append(chosen.repeat(2) if is_guided else chosen)
        is_last = step + 1 == len(codes[0])
        rows = None if candidates is None or is_last else candidates.resampled(step)
        if rows is not None:
            codes.copy_(codes[rows])
            decoder.reorder(torch.cat([rows, rows + len(rows)]) if is_guided else rows)


def sample(
    prior: Prior,
    inputs: Any,
    generators: Sequence[torch.Generator],
    *,
    temperature: FloatPerLayer = 1.0,
    top_k: OptionalIntPerLayer = None,
    top_p: OptionalFloatPerLayer = None,
    guidance_scale: float = 1.0,
    known: Sequence[Tensor] | None = None,
    num_candidates: int = NUM_CANDIDATES,
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
    return sampler(
        inputs, generators, known=known, num_candidates=num_candidates, progress=progress
    )


def _known_later(
    codes: Int[Tensor, "batch steps slots"], ordering: CodeOrdering
) -> Bool[Tensor, "batch steps slots"]:
    """Where a code is known and an earlier one of the image is not."""
    is_unknown = codes < 0
    return (is_unknown.flatten(1).cumsum(1) > 0).view_as(codes) & ~is_unknown & ordering.mask


def _uniforms(generators: Sequence[torch.Generator], number: int) -> Tensor:
    """(B, number), all of an image's at once, so that known codes do not shift the others."""
    if not generators:
        raise InputError("generators must hold one generator per image, got none")
    for generator in generators:
        if generator.device.type != "cpu":
            raise InputError(f"generators must be on the CPU, got one on {generator.device}")
    return torch.stack([torch.rand(number, generator=g, dtype=torch.float64) for g in generators])


def _check_known(prior: Prior, known: Any, batch: int) -> list[Tensor]:
    device, ordering = prior.start.device, prior.ordering
    if known is None:
        return [
            torch.full((batch, m.depth, m.height, m.width), -1, device=device)
            for m in ordering.code_maps
        ]
    ordering.check(known, "known", allows_unknown=True)
    if len(known[0]) != batch:
        raise InputError(f"known must hold {batch} images, got {len(known[0])}")
    return [tensor.to(device) for tensor in known]
