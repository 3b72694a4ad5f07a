"""Drawing codes."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior import Sampler, sample, sample_generators
from prior.logits_filter import draw, filter_logits
from tests.prior.small_priors import NULL, ORDERS, PYRAMID, assert_close, make_prior, random_codes
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError

TINY = (CodeMapConfig(height=2, width=1, codebook_sizes=(2, 3), code_dim=3),)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered": {"temperature": 0.7, "top_k": [5, 3, None], "top_p": [None, 1.0, 0.8]},
    "guided": {"guidance_scale": 2.5},
}


def reference_filter(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Probabilities, code by code."""
    order = sorted(range(len(logits)), key=lambda code: (-logits[code], code))[:top_k]
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    kept, share = [], 0.0
    for code in order:
        if top_p is None or share < top_p - 1e-12:
            kept.append(code)
        share += weights[code] / sum(weights[other] for other in order)
    total = sum(weights[code] for code in kept)
    return [weight / total if code in kept else 0.0 for code, weight in enumerate(weights)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    st.floats(0.1, 5),
    st.data(),
)
def test_filtered_probabilities_equal_the_literal_reference(
    logits: list[int], temperature: float, data: st.DataObject
) -> None:
    values = [value / 2 for value in logits]
    top_k = data.draw(st.none() | st.integers(1, len(values)))
    # Odd shares, which sums of few equal probabilities do not hit.
    top_p = data.draw(st.none() | st.sampled_from([0.0313, 0.2717, 0.5771, 0.9049, 0.9999]))
    tensor = torch.tensor(values, dtype=torch.float64)
    filtered = filter_logits(tensor, temperature, top_k, top_p)
    expected = torch.tensor(
        reference_filter(values, temperature, top_k, top_p), dtype=torch.float64
    )
    torch.testing.assert_close(filtered.softmax(-1), expected)


def test_draws_invert_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).log()
    uniforms = torch.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-53], dtype=torch.float64)
    codes = draw(logits.expand(6, 5), uniforms)
    assert codes.tolist() == [0, 0, 2, 2, 3, 3]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_codes_of_probability_zero_are_never_drawn(seed: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, number, generator=generator, dtype=torch.float64) * 5
    top_k = 1 + seed % number
    logits = filter_logits(logits, 1.0, top_k)
    for uniform in (0.0, 1 - 2**-53):
        uniforms = torch.full((64,), uniform, dtype=torch.float64)
        codes = draw(logits, uniforms)
        assert logits.gather(1, codes.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("condition", ["class", "custom"])
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_depends_on_its_generator_and_condition_alone(
    order: str, condition: str, setting: str
) -> None:
    prior = make_prior(order=order, condition=condition)
    labels = torch.tensor([0, 2, 1, 0, 1, 2])
    together = sample(prior, labels, sample_generators(5, range(6)), **SETTINGS[setting])
    sampler = Sampler(prior, **SETTINGS[setting])
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        alone = [sampler(labels[i : i + 1], sample_generators(5, [i])) for i in range(6)]
    assert_close([torch.cat(groups) for groups in zip(*alone, strict=True)], together)
    prior.ordering.check(together)
    assert len({tuple(group.tolist()) for group in together[1].flatten(1)}) == 6


def test_generators_are_a_function_of_seed_and_sample_index() -> None:
    first = {}
    for seed in range(4):
        for index, generator in enumerate(sample_generators(seed, range(4))):
            first[seed, index] = torch.rand(1, generator=generator, dtype=torch.float64).item()
    assert len(set(first.values())) == 16
    again = torch.rand(1, generator=sample_generators(2, [3])[0], dtype=torch.float64).item()
    assert again == first[2, 3]
    with pytest.raises(InputError, match="sample index must be >= 0, got -1"):
        sample_generators(3, [-1])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sampled_frequencies_equal_the_exact_probabilities(guidance_scale: float) -> None:
    prior = make_prior(TINY, sharpness=2.0)
    number = 20_000
    labels = torch.ones(number, dtype=torch.int64)
    indices = sample(
        prior, labels, sample_generators(0, range(number)), guidance_scale=guidance_scale
    )
    combinations = torch.tensor(list(itertools.product(range(2), range(2), range(3), range(3))))
    weights = torch.tensor([18, 9, 3, 1])  # mixed radix of (2, 2, 3, 3)
    counts = torch.bincount((indices[0].flatten(1) * weights).sum(1), minlength=36)
    tables = [combinations.view(-1, 2, 2, 1)]
    conditional = prior.logits(tables, torch.ones(36, dtype=torch.int64))[0]
    null = prior.logits(tables, torch.full((36,), NULL))[0]
    log_prob = torch.zeros(36, dtype=torch.float64)
    for layer in range(2):
        guided = null[layer] + guidance_scale * (conditional[layer] - null[layer])
        chosen = guided.double().log_softmax(-1).gather(-1, tables[0][:, layer].unsqueeze(-1))
        log_prob += chosen.sum((1, 2, 3))
    expected = log_prob.exp() * number
    assert expected.min() > 5
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 66.6  # 99.9 % of chi-square with 35 degrees of freedom


@pytest.mark.parametrize("condition", ["class", "custom"])
@pytest.mark.parametrize("order", ORDERS)
def test_guidance_scale_zero_is_the_null_condition(order: str, condition: str) -> None:
    prior = make_prior(order=order, condition=condition)
    generators = [sample_generators(1, range(3)) for _ in range(2)]
    guided = sample(prior, torch.tensor([0, 2, 1]), generators[0], guidance_scale=0.0)
    assert_close(guided, sample(prior, None, generators[1]))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("order", ORDERS)
def test_known_codes_are_kept_and_the_rest_is_drawn(order: str, setting: str) -> None:
    prior = make_prior(order=order)
    labels = torch.tensor([0, 2, 1])
    generator = torch.Generator().manual_seed(0)
    truth = sample(prior, labels, sample_generators(9, range(3)))
    known = [
        group.masked_fill(torch.rand(group.shape, generator=generator) < 0.5, -1) for group in truth
    ]
    indices = sample(
        prior, labels, sample_generators(1, range(3)), known=known, **SETTINGS[setting]
    )
    prior.ordering.check(indices)
    for drawn, given_codes in zip(indices, known, strict=True):
        is_known = given_codes >= 0
        assert torch.equal(drawn[is_known], given_codes[is_known])
    assert not torch.equal(indices[1], truth[1])


@pytest.mark.parametrize("order", ORDERS)
def test_completing_the_first_steps_with_the_same_generators_changes_nothing(order: str) -> None:
    prior = make_prior(order=order)
    labels = torch.tensor([0, 2, 1])
    steps: list[int] = []
    whole = sample(prior, labels, sample_generators(1, range(3)), progress=steps.append)
    assert steps == [1 + step for step in range(prior.ordering.num_steps)]
    for num_steps in range(prior.ordering.num_steps + 1):
        codes = prior.ordering.flatten(whole)
        codes[:, num_steps:] = -1
        known = prior.ordering.unflatten(codes)
        again = sample(prior, labels, sample_generators(1, range(3)), known=known)
        assert_close(again, whole)


PAIR = (
    CodeMapConfig(height=2, width=1, codebook_sizes=(3,), code_dim=3),
    CodeMapConfig(height=4, width=1, codebook_sizes=(2,), code_dim=3),
)


@pytest.mark.parametrize(
    ("order", "known_group", "num_candidates", "guidance_scale", "bounds"),
    [
        ("coarse_to_fine", 0, 1, 1.0, (0, 0.045)),  # exact: what is left is noise of 4000 images
        ("cell", 0, 1, 1.0, (0.15, 1)),  # the coarse code of the later cell is not seen
        ("cell", 0, 64, 1.0, (0, 0.045)),
        ("cell", 0, 64, 2.0, (0, 0.06)),
        ("coarse_to_fine", 1, 64, 1.0, (0, 0.045)),
    ],
)
def test_completion_follows_the_true_conditional_distribution(
    order: str,
    known_group: int,
    num_candidates: int,
    guidance_scale: float,
    bounds: tuple[float, float],
) -> None:
    prior = make_prior(PAIR, order, sharpness=9.0)
    given_codes = torch.tensor([[2, 0], [1, 0, 0, 1]][known_group])
    free = 1 - known_group
    sizes, number = [(3,) * 2, (2,) * 4], 4000
    combinations = torch.tensor(list(itertools.product(*map(range, sizes[free]))))
    tables = [combinations.view(-1, 1, sides, 1) for sides in (2, 4)[free : free + 1]]
    tables.insert(known_group, given_codes.view(1, 1, -1, 1).expand(len(combinations), -1, -1, -1))
    rows = len(combinations)
    layers = prior.logits(tables, torch.ones(rows).long())
    nulls = prior.logits(tables, torch.full((rows,), NULL))
    log_prob = torch.zeros(rows).double()
    for group in range(2):
        logits = nulls[group][0] + guidance_scale * (layers[group][0] - nulls[group][0])
        chosen = logits.double().log_softmax(-1).gather(-1, tables[group][:, 0].unsqueeze(-1))
        log_prob += chosen.sum((1, 2, 3))
    expected = log_prob.softmax(0)
    known = [torch.full((number, *m.shape[1:]), -1) for m in tables]
    known[known_group] = tables[known_group][:1].expand(number, -1, -1, -1)
    indices = sample(
        prior,
        torch.ones(number).long(),
        sample_generators(0, range(number)),
        guidance_scale=guidance_scale,
        known=known,
        num_candidates=num_candidates,
    )
    weights = torch.tensor([[3, 1], [8, 4, 2, 1]][free])
    counts = torch.bincount((indices[free].flatten(1) * weights).sum(1), minlength=rows)
    distance = (counts / number - expected).abs().sum().item() / 2
    assert bounds[0] <= distance < bounds[1]


def test_a_completion_depends_on_its_generator_and_known_codes_alone() -> None:
    prior = make_prior(condition="custom")
    labels = torch.tensor([0, 2, 1])
    known = [group.clone() for group in random_codes(PYRAMID, 3)]
    known[1][:, 0, 0] = -1
    known[1][1] = -1
    known[0][1] = -1  # the second is drawn freely, as without known codes
    generators = [sample_generators(0, range(3)) for _ in range(2)]
    together = sample(prior, labels, generators[0], known=known, guidance_scale=2.0)
    sampler = Sampler(prior, guidance_scale=2.0)
    alone = [
        sampler(labels[i : i + 1], sample_generators(0, [i]), known=[g[i : i + 1] for g in known])
        for i in range(3)
    ]
    assert_close([torch.cat(groups) for groups in zip(*alone, strict=True)], together)
    free = sample(prior, labels, generators[1], guidance_scale=2.0)
    assert_close([group[1] for group in together], [group[1] for group in free])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": math.nan}, r"temperature must be > 0, from 1e-06 to 1000000\.0, got nan"),
        ({"top_k": 5}, r"top_k must lie in \[1, 4\], got 5"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"guidance_scale": math.inf}, r"guidance_scale must lie in \[0, 1000\.0\], got inf"),
        ({"inputs": None, "guidance_scale": 2.0}, "guidance_scale must be 1 without labels"),
        ({"inputs": torch.tensor([0, 3])}, r"labels must lie in \[0, 3\), got 3"),
        ({"inputs": torch.zeros(0).long(), "generators": []}, "generators must hold one"),
        ({"known": [torch.zeros(2, 2, 2, 2).long()]}, "known must hold 2 maps, got 1"),
        ({"known": random_codes(PYRAMID, 3)}, "known must hold 2 images, got 3"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {
        "inputs": torch.tensor([0, 1]),
        "generators": sample_generators(0, range(2)),
        **arguments,
    }
    with pytest.raises(InputError, match=message):
        sample(make_prior(), **given_arguments)


def test_a_prior_without_null_condition_needs_labels_and_cannot_be_guided() -> None:
    prior = make_prior(label_dropout=0.0)
    generators = sample_generators(0, range(2))
    with pytest.raises(InputError, match=r"labels or condition must be given .* label_dropout"):
        sample(prior, None, generators)
    with pytest.raises(InputError, match=r"guidance_scale must be 1 .* label_dropout, got 2.0"):
        sample(prior, torch.tensor([0, 1]), generators, guidance_scale=2.0)
    with pytest.raises(InputError, match="labels must be None"):
        sample(make_prior(condition="none"), torch.tensor([0, 1]), generators)
    with pytest.raises(InputError, match="evaluation mode"):
        sample(prior.train(), torch.tensor([0, 1]), generators)
