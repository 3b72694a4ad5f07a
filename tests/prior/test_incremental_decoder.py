"""The static cache beside the plain forward of x-transformers."""

import pytest
import torch
from torch import Tensor, nn

from prior import IncrementalDecoder, Sampler, sample, sample_generators
from prior.static_transformer import StaticTransformer
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@CONDITIONS
@LAYOUTS
def test_cached_logits_equal_the_full_forward(
    order: str, positions: str, condition: str, dtype: torch.dtype, tolerance: float
) -> None:
    prior = trained_prior(order, positions, condition=condition).to(dtype)
    indices, inputs = random_indices(prior, 3), inputs_of(prior, [0, 2, NULL])
    expected = every_logit(prior, indices, inputs)
    assert_close(cached_logits(decoder_of(prior, inputs, 3), indices), expected, tolerance)


@CONDITIONS
@LAYOUTS
def test_cached_logits_need_not_be_asked_for(order: str, positions: str, condition: str) -> None:
    prior = trained_prior(order, positions, condition=condition).double()
    indices, inputs = random_indices(prior, 2), inputs_of(prior, [0, 2])
    expected = every_logit(prior, indices, inputs)
    codes = prior.ordering.flatten(indices)
    decoder = decoder_of(prior, inputs, 2)
    places = prior.ordering.mask.nonzero().tolist()
    for number, ((step, slot), logits) in enumerate(zip(places, expected, strict=True)):
        if number % 5 in (2, 4) or number > 18:
            assert_close([decoder.next_logits()], [logits], 1e-12)
        decoder.append(codes[:, step, slot])


def test_a_strong_dropout_in_training_changes_nothing_in_use() -> None:
    prior = trained_prior("cell", dropout=0.9)
    indices, inputs = random_indices(prior, 2), inputs_of(prior, [0, 2])
    expected = every_logit(prior, indices, inputs)
    assert_close(cached_logits(decoder_of(prior, inputs, 2), indices), expected, 1e-5)


@CONDITIONS
def test_a_decoder_that_is_restarted_equals_a_new_one(condition: str) -> None:
    prior = trained_prior("coarse_to_fine", condition=condition)
    first, second = inputs_of(prior, [0, 2]), inputs_of(prior, [1, NULL])
    decoder = decoder_of(prior, first, 2)
    cached_logits(decoder, random_indices(prior, 2, seed=5))
    decoder.restart(prior.condition(second, 2))
    found = cached_logits(decoder, random_indices(prior, 2))
    assert_close(found, cached_logits(decoder_of(prior, second, 2), random_indices(prior, 2)))


def test_a_condition_with_a_vector_at_times_is_refused() -> None:
    prior = make_prior()
    condition = prior.null_condition(2)
    decoder = IncrementalDecoder(prior, condition, 2)
    with pytest.raises(InputError, match="vector must be given always or never"):
        decoder.restart(condition._replace(vector=None))


def test_known_codes_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = trained_prior("cell")
    decoder = decoder_of(prior, torch.tensor([0, 1]), 2)
    calls: list[tuple[int, int]] = []
    take = StaticTransformer.__call__

    def counted(transformer: StaticTransformer, inputs: Tensor, first: int) -> Tensor:
        calls.append((inputs.shape[1], first))
        return take(transformer, inputs, first)

    monkeypatch.setattr(StaticTransformer, "__call__", counted)
    codes = prior.ordering.flatten(random_indices(prior, 2))
    for code in codes[:, :3].flatten(1).unbind(1):
        decoder.append(code)
    assert calls == []
    decoder.next_logits()
    assert calls == [(4, 0), (1, 0)]  # the steps, then one slot


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="promised with oneDNN")
@pytest.mark.parametrize(("num_threads", "condition"), [(1, "class"), (1, "custom"), (2, "custom")])
@LAYOUTS
def test_on_a_cpu_logits_do_not_depend_on_the_batch_bit_for_bit(
    order: str, positions: str, num_threads: int, condition: str
) -> None:
    prior = trained_prior(order, positions, condition=condition)
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


@pytest.mark.parametrize("condition", ["class", "custom"])
@LAYOUTS
def test_guided_codes_are_those_of_the_guided_forward(
    order: str, positions: str, condition: str
) -> None:
    prior = trained_prior(order, positions, condition=condition)
    labels = torch.tensor([0, 2, 1])
    found = sample(prior, labels, sample_generators(0, range(3)), top_k=1, guidance_scale=3.0)
    with torch.no_grad():
        conditional, null = prior.logits(found, labels), prior.logits(found, torch.full((3,), NULL))
    for group, codes in enumerate(found):
        for layer in range(codes.shape[1]):
            logits = null[group][layer] + 3 * (conditional[group][layer] - null[group][layer])
            torch.testing.assert_close(codes[:, layer], logits.argmax(-1))


@pytest.mark.parametrize("condition", ["class", "custom"])
def test_batches_of_one_sampler_equal_samples_alone_even_under_autocast(condition: str) -> None:
    prior = trained_prior("cell", condition=condition)
    settings = {"temperature": 0.8, "guidance_scale": 1.5}
    sampler = Sampler(prior, **settings)
    known = random_indices(prior, 2)
    known[1].fill_(-1)
    for first, last, given in ((0, 2, None), (2, 4, None), (4, 6, known), (6, 7, None)):
        labels = torch.arange(first, last) % 3
        generators, others = (sample_generators(0, range(first, last)) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16):
            found = sampler(labels, generators, known=given)
        assert_close(found, sample(prior, labels, others, known=given, **settings))


def test_another_structure_of_x_transformers_is_named_before_sampling() -> None:
    for change, message in (
        (lambda decoder: setattr(decoder, "pre_norm", False), "pre_norm of Decoder is False"),
        (lambda decoder: setattr(decoder.layers[2][1], "laser", True), "laser of layer 2 is True"),
        (lambda decoder: delattr(decoder.layers[0][1], "causal"), "causal of layer 0 is 'nothing'"),
        (
            lambda decoder: decoder.layers[1][1].ff.append(nn.Linear(16, 16)),
            r"layer 1 has the weights .*1\.ff\.3\.bias",
        ),
        (
            lambda decoder: setattr(decoder.layers[1][1].ff[0], "act", nn.GELU()),
            r"layer 1 has the activation GELU.*, not SiLU",
        ),
    ):
        prior = make_prior()
        change(prior.spatial_transformer.attn_layers)
        with pytest.raises(InputError, match=rf"^x-transformers \d+\.[\d.]+ has .*: {message}"):
            sample(prior, torch.tensor([0]), sample_generators(0, [0]))
