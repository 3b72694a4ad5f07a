"""Drawing codes."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prior import Prior, PriorConfig, PriorNetworkConfig, sample, sample_generators
from prior.logits_filter import draw, filter_logits
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError

torch.set_num_threads(1)

PYRAMID = (
    CodeMapConfig(height=2, width=2, codebook_sizes=(5, 4), code_dim=3),
    CodeMapConfig(height=4, width=4, codebook_sizes=(6,), code_dim=4),
)
TINY = (CodeMapConfig(height=2, width=1, codebook_sizes=(2, 3), code_dim=3),)
ORDERS = ("coarse_to_fine", "cell")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered": {"temperature": 0.7, "top_k": [5, 3, None], "top_p": [None, 1.0, 0.8]},
    "guided": {"guidance_scale": 2.5},
}


def make_prior(
    code_maps: tuple[CodeMapConfig, ...] = PYRAMID,
    order: str = "cell",
    num_classes: int = 3,
    sharpness: float = 6.0,
    **network: float | str,
) -> Prior:
    """A small prior; with the default sharpness its outputs are far from uniform."""
    torch.manual_seed(0)
    fields = {
        "width": 16,
        "num_spatial_layers": 2,
        "num_depth_layers": 1,
        "num_heads": 2,
        **network,
    }
    config = PriorConfig(
        network=PriorNetworkConfig.model_validate({"order": order, **fields}),
        code_maps=code_maps,
        num_classes=num_classes,
    )
    prior = Prior(config).eval()
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.mul_(sharpness)
    return prior


def assert_same(indices: list[Tensor], expected: list[Tensor]) -> None:
    for group, expected_group in zip(indices, expected, strict=True):
        torch.testing.assert_close(group, expected_group, rtol=0, atol=0)


def reference_filter(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """Probabilities, code by code."""
    exponents = [value / temperature for value in logits]
    order = sorted(range(len(logits)), key=lambda code: (-exponents[code], code))
    order = order[: top_k or len(order)]

    def normalize(codes: list[int]) -> dict[int, float]:
        weights = {code: math.exp(exponents[code] - exponents[order[0]]) for code in codes}
        return {code: weight / sum(weights.values()) for code, weight in weights.items()}

    if top_p is not None:
        probabilities, kept, total = normalize(order), [], 0.0
        for code in order:
            if total < top_p - 1e-12:
                kept.append(code)
            total += probabilities[code]
        order = kept
    final = normalize(order)
    return [final.get(code, 0.0) for code in range(len(logits))]


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


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for top_p, number in [(1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)]:
        assert int(filter_logits(logits, 1.0, None, top_p).isfinite().sum()) == number


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
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_does_not_depend_on_its_batch(order: str, setting: str) -> None:
    prior = make_prior(order=order)
    labels = torch.tensor([0, 2, 1, 0, 1, 2])
    together = sample(prior, labels, sample_generators(5, range(6)), **SETTINGS[setting])
    alone = [
        sample(prior, labels[i : i + 1], sample_generators(5, [i]), **SETTINGS[setting])
        for i in range(6)
    ]
    assert_same([torch.cat(groups) for groups in zip(*alone, strict=True)], together)
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
    with pytest.raises(InputError, match="must be >= 0, got 3 and -1"):
        sample_generators(3, [-1])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_sampled_frequencies_equal_the_exact_probabilities(guidance_scale: float) -> None:
    prior = make_prior(TINY, num_classes=2, sharpness=2.0)
    number = 20_000
    labels = torch.ones(number, dtype=torch.int64)
    indices = sample(
        prior, labels, sample_generators(0, range(number)), guidance_scale=guidance_scale
    )
    combinations = torch.tensor(list(itertools.product(range(2), range(2), range(3), range(3))))
    weights = torch.tensor([18, 9, 3, 1])  # mixed radix of (2, 2, 3, 3)
    counts = torch.bincount((indices[0].flatten(1) * weights).sum(1), minlength=36)
    tables = [combinations.view(-1, 2, 2, 1)]
    if guidance_scale == 1:
        log_prob = prior.log_prob(tables, torch.ones(36, dtype=torch.int64)).double()
    else:
        conditional = prior.logits(tables, torch.ones(36, dtype=torch.int64))[0]
        null = prior.logits(tables, torch.full((36,), 2))[0]
        log_prob = torch.zeros(36, dtype=torch.float64)
        for layer in range(2):
            guided = null[layer] + guidance_scale * (conditional[layer] - null[layer])
            log_probs = guided.double().log_softmax(-1)
            chosen = log_probs.gather(-1, tables[0][:, layer].unsqueeze(-1))
            log_prob += chosen.sum((1, 2, 3))
    expected = log_prob.exp() * number
    assert expected.min() > 5
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 66.6  # 99.9 % of chi-square with 35 degrees of freedom


def test_guidance_scale_one_equals_plain_and_others_do_not() -> None:
    prior = make_prior()
    labels = torch.tensor([0, 2, 1])

    def draws(**arguments: float) -> list[Tensor]:
        return sample(prior, labels, sample_generators(1, range(3)), **arguments)

    assert_same(draws(guidance_scale=1.0), draws())
    # Close to 1 the doubled batch is used and has to give the same.
    assert_same(draws(guidance_scale=1.0 + 1e-9), draws())
    assert not torch.equal(draws(guidance_scale=4.0)[1], draws()[1])


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_scale_zero_is_the_null_class(order: str) -> None:
    prior = make_prior(order=order)
    generators = [sample_generators(1, range(3)) for _ in range(2)]
    guided = sample(prior, torch.tensor([0, 2, 1]), generators[0], guidance_scale=0.0)
    assert_same(guided, sample(prior, None, generators[1]))


@pytest.mark.parametrize("order", ORDERS)
def test_top_k_one_takes_the_most_probable_code_every_time(order: str) -> None:
    prior = make_prior(order=order)
    labels = torch.tensor([0, 2, 1])
    indices = sample(prior, labels, sample_generators(1, range(3)), top_k=1)
    for group, layers in enumerate(prior.logits(indices, labels)):
        for layer, logits in enumerate(layers):
            torch.testing.assert_close(logits.argmax(-1), indices[group][:, layer])
    cold = sample(prior, labels, sample_generators(2, range(3)), temperature=1e-6)
    assert_same(cold, indices)
    nucleus = sample(prior, labels, sample_generators(3, range(3)), top_p=1e-6)
    assert_same(nucleus, indices)


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
    whole = sample(prior, labels, sample_generators(1, range(3)))
    for num_steps in range(prior.ordering.num_steps + 1):
        codes = prior.ordering.flatten(whole)
        codes[:, num_steps:] = -1
        known = prior.ordering.unflatten(codes)
        again = sample(prior, labels, sample_generators(1, range(3)), known=known)
        assert_same(again, whole)


def test_a_known_coarse_map_is_kept_whole() -> None:
    prior = make_prior(order="coarse_to_fine", num_classes=0)
    coarse = torch.tensor([[[[4, 3], [2, 1]], [[0, 1], [2, 3]]]])
    known = [coarse, torch.full((1, 1, 4, 4), -1)]
    indices = sample(prior, None, sample_generators(0, [0]), known=known)
    assert torch.equal(indices[0], coarse)
    assert torch.equal(known[1], torch.full((1, 1, 4, 4), -1))


def test_progress_is_told_every_step() -> None:
    prior = make_prior(num_classes=0)
    steps: list[int] = []
    sample(prior, None, sample_generators(0, range(2)), progress=steps.append)
    assert steps == [1, 2, 3, 4]


def test_uniforms_of_neighboring_samples_are_uncorrelated() -> None:
    uniforms = torch.stack(
        [torch.rand(500, generator=g, dtype=torch.float64) for g in sample_generators(0, range(20))]
    )
    correlations = np.corrcoef(uniforms.numpy()) - np.eye(20)
    assert np.abs(correlations).max() < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be > 0, from 1e-06 to 1000000\.0, got -1.0"),
        ({"temperature": 0.0}, r"temperature must be > 0, from 1e-06 to 1000000\.0, got 0.0"),
        ({"temperature": math.nan}, r"temperature must be > 0, from 1e-06 to 1000000\.0, got nan"),
        ({"temperature": [1.0, 1.0]}, "temperature must hold 3 values, one per layer, got 2"),
        ({"top_k": 0}, r"top_k must lie in \[1, 5\], got 0"),
        ({"top_k": 5}, r"top_k must lie in \[1, 4\], got 5"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": [None, 1.5, None]}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"guidance_scale": -0.5}, r"guidance_scale must lie in \[0, 1000\.0\], got -0.5"),
        ({"guidance_scale": math.inf}, r"guidance_scale must lie in \[0, 1000\.0\], got inf"),
        ({"labels": None, "guidance_scale": 2.0}, "guidance_scale must be 1 without labels"),
        ({"labels": torch.tensor([0, 3])}, r"labels must lie in \[0, 3\), got 3"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels must have shape \(2,\), got \(3,\)"),
        ({"labels": torch.zeros(0).long(), "generators": []}, "generators must hold one"),
        ({"known": [torch.zeros(2, 2, 2, 2).long()]}, "known must hold 2 maps, got 1"),
        (
            {"known": [torch.zeros(2, 2, 2, 2).long(), torch.full((2, 1, 4, 4), 6)]},
            r"known\[1\], layer 0, must lie in \[-1, 6\), got 6",
        ),
        (
            {"known": [torch.zeros(3, 2, 2, 2).long(), torch.zeros(3, 1, 4, 4).long()]},
            "known must hold 2 images, as generators, got 3",
        ),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {
        "labels": torch.tensor([0, 1]),
        "generators": sample_generators(0, range(2)),
        **arguments,
    }
    with pytest.raises(InputError, match=message):
        sample(make_prior(), **given_arguments)


def test_a_prior_without_null_class_needs_labels_and_cannot_be_guided() -> None:
    prior = make_prior(label_dropout=0.0)
    generators = sample_generators(0, range(2))
    with pytest.raises(InputError, match="labels: this prior was trained without label_dropout"):
        sample(prior, None, generators)
    with pytest.raises(InputError, match="guidance_scale: this prior was trained without"):
        sample(prior, torch.tensor([0, 1]), generators, guidance_scale=2.0)
    with pytest.raises(InputError, match="labels must be None"):
        sample(make_prior(num_classes=0), torch.tensor([0, 1]), generators)
    with pytest.raises(InputError, match="evaluation mode"):
        sample(prior.train(), torch.tensor([0, 1]), generators)
