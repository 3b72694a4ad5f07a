"""The static cache beside the plain forward of x-transformers."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prior import IncrementalDecoder, sample, sample_generators
from tests.prior.small_priors import (
    CONDITIONS,
    LAYOUTS,
    NULL,
    assert_close,
    cached_logits,
    decoder_of,
    every_logit,
    inputs_of,
    make_prior,
    random_indices,
    trained_prior,
)
from tokenizer.storage.errors import InputError

SHORT_RUNS = ("value_residual", "adaptive_norm")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@CONDITIONS
@LAYOUTS
def test_cached_logits_equal_the_full_forward(
    order: str, positions: str, condition: str, dtype: torch.dtype, tolerance: float
) -> None:
    prior = copy.deepcopy(trained_prior(order, positions, condition=condition)).to(dtype)
    indices, inputs = random_indices(prior, 3), inputs_of(prior, [0, 2, NULL])
    expected = every_logit(prior, indices, inputs)
    decoder = decoder_of(prior, inputs, 3)
    assert_close(cached_logits(decoder, indices), expected, tolerance)
    decoder.restart(prior.condition(inputs, 3))
    codes = prior.ordering.flatten(indices)
    places = prior.ordering.mask.nonzero().tolist()
    for number, ((step, slot), logits) in enumerate(zip(places, expected, strict=True)):
        if number % 5 in (2, 4) or number > 18:  # they need not be asked for
            assert_close([decoder.next_logits()], [logits], tolerance)
        decoder.append(codes[:, step, slot])


@CONDITIONS
@pytest.mark.parametrize(
    "network",
    [{"value_residual": True}, {"adaptive_norm": True}, dict.fromkeys(SHORT_RUNS, True)],
    ids=" and ".join,
)
def test_cached_logits_equal_the_full_forward_with_what_helps_short_runs(
    network: dict[str, bool], condition: str
) -> None:
    prior = trained_prior("coarse_to_fine", "rotary", condition=condition, **network)
    indices, labels = random_indices(prior, 13), [number % 4 for number in range(13)]
    expected = every_logit(prior, indices, inputs_of(prior, labels))
    decoder = decoder_of(prior, inputs_of(prior, labels[::-1]), 13)
    parts = prior.condition(inputs_of(prior, labels), 13)
    decoder.restart(parts)  # the condition is taken anew
    together = cached_logits(decoder, indices)
    assert_close(together, expected, 1e-5)
    for rows in (slice(0, 1), slice(5, 8)):
        some = type(parts)(*(None if part is None else part[rows] for part in parts))
        alone = IncrementalDecoder(prior, some, rows.stop - rows.start)
        found = cached_logits(alone, [group[rows] for group in indices])
        assert_close(found, [logits[rows] for logits in together])


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="promised with oneDNN")
@pytest.mark.parametrize(
    ("num_threads", "condition", "dtype"),
    [
        (1, "class", torch.float32),
        (1, "custom", torch.float32),
        (2, "custom", torch.float32),
        (1, "custom", torch.bfloat16),
    ],
)
@LAYOUTS
def test_on_a_cpu_logits_do_not_depend_on_the_batch_bit_for_bit(
    order: str, positions: str, num_threads: int, condition: str, dtype: torch.dtype
) -> None:
    prior = copy.deepcopy(trained_prior(order, positions, condition=condition)).to(dtype)
    indices, labels = random_indices(prior, 13), [number % 4 for number in range(13)]
    parts = prior.condition(inputs_of(prior, labels), 13)
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = cached_logits(IncrementalDecoder(prior, parts, 13), indices)
        for first, last in ((0, 1), (12, 13), (3, 5), (5, 8), (1, 6), (4, 12)):
            rows = slice(first, last)
            some = type(parts)(*(None if part is None else part[rows] for part in parts))
            decoder = IncrementalDecoder(prior, some, last - first)
            alone = cached_logits(decoder, [group[rows] for group in indices])
            assert_close(alone, [logits[rows] for logits in together])
    finally:
        torch.set_num_threads(previous)


@LAYOUTS
def test_half_the_bytes_draw_nearly_the_same_codes(order: str, positions: str) -> None:
    prior = trained_prior(order, positions)
    half = copy.deepcopy(prior).bfloat16()
    labels, generators = torch.arange(60) % NULL, functools.partial(sample_generators, 0)
    whole_codes, half_codes = (sample(own, labels, generators(range(60))) for own in (prior, half))
    same = [one == other for one, other in zip(whole_codes, half_codes, strict=True)]
    assert torch.cat([group.flatten() for group in same]).double().mean() > 0.9
    whole, halved = (every_logit(own, whole_codes, labels) for own in (prior, half))
    assert_close([logits.bfloat16() for logits in halved], [own.bfloat16() for own in whole], 0.25)
    found = cached_logits(decoder_of(half, labels, 60), whole_codes)
    assert_close(found, [logits.bfloat16() for logits in halved], 0.25)


@pytest.mark.parametrize(
    ("condition", "scale", "settings"),
    [
        ("class", 3.0, {"top_k": 1}),
        ("custom", 3.0, {"temperature": 1e-6}),
        ("class", 1.0, {"top_p": 1e-6}),
    ],
)
@LAYOUTS
def test_the_likeliest_codes_are_those_of_the_guided_forward(
    order: str, positions: str, condition: str, scale: float, settings: dict[str, Any]
) -> None:
    prior = trained_prior(order, positions, condition=condition)
    labels = torch.tensor([0, 2, 1])
    generators = sample_generators(0, range(3))
    found = sample(prior, labels, generators, guidance_scale=scale, **settings)
    with torch.no_grad():
        conditional, null = prior.logits(found, labels), prior.logits(found, torch.full((3,), NULL))
    for group, codes in enumerate(found):
        for layer in range(codes.shape[1]):
            logits = null[group][layer] + scale * (conditional[group][layer] - null[group][layer])
            torch.testing.assert_close(codes[:, layer], logits.argmax(-1))


def test_another_structure_of_x_transformers_is_named_before_sampling() -> None:
    changes: dict[str, Callable[[Any], None]] = {
        "pre_norm of Decoder is False": lambda decoder: setattr(decoder, "pre_norm", False),
        "causal of layer 2 is 'nothing'": lambda decoder: delattr(decoder.layers[2][1], "causal"),
        r"layer 1 has .*1\.ff\.3\.bias": lambda decoder: decoder.layers[1][1].ff.append(
            nn.Linear(2, 2)
        ),
        r"activation GELU.*, not SiLU": lambda decoder: setattr(
            decoder.layers[1][1].ff[0], "act", nn.GELU()
        ),
    }
    for message, change in changes.items():
        prior = make_prior()
        change(prior.spatial_transformer.attn_layers)
        with pytest.raises(InputError, match=rf"^x-transformers \d+\.[\d.]+ has .*: .*{message}"):
            sample(prior, torch.tensor([0]), sample_generators(0, [0]))
