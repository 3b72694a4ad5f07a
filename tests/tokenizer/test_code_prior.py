"""The prior inside the tokenizer: a distribution over codes, and what trains it."""

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.tokenizer.test_search import SMALL, decoding_of, every_code, squared_errors
from tests.tokenizer.tiny import BASELINE, HYBRID, make_tokenizer, random_images, seeded
from tokenizer import InputError, SearchConfig, Tokenizer, TokenizerConfig
from tokenizer.code_prior import most_likely
from tokenizer.code_prior_config import CodePriorConfig


def with_prior(config: TokenizerConfig, num_passes: int = 4) -> TokenizerConfig:
    prior = CodePriorConfig(width=8, num_passes=num_passes)
    return config.model_copy(update={"code_prior": prior})


@functools.cache
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    """With heads that are far from uniform."""
    tokenizer = make_tokenizer(config).eval()
    assert tokenizer.code_prior is not None
    with torch.no_grad():
        for name, parameter in tokenizer.code_prior.named_parameters():
            if ".4." in name:  # the last layer of each
                parameter.copy_(2 * torch.randn(parameter.shape, generator=seeded()))
    return tokenizer


HQ, SIZE = with_prior(SMALL["HQ-VAE"][0]), SMALL["HQ-VAE"][1]


@pytest.mark.parametrize("num_passes", [1, 4, 16])
def test_probabilities_of_all_codes_add_up_to_one(num_passes: int) -> None:
    tokenizer = tokenizer_of(with_prior(SMALL["HQ-VAE"][0], num_passes))
    codes = every_code(tokenizer, torch.zeros(1, 1, *SIZE))
    bits = tokenizer.code_length(codes)
    assert bits.shape == (64, 3)
    assert torch.exp2(-bits.sum(1)).sum().item() == pytest.approx(1)
    assert bits.std(0).min() > 0.1  # nor is it uniform


def test_samples_come_as_often_as_their_code_length_says() -> None:
    tokenizer = tokenizer_of(HQ)
    codes = every_code(tokenizer, torch.zeros(1, 1, *SIZE))
    expected = torch.exp2(-tokenizer.code_length(codes).sum(1))
    images = tokenizer.sample(20_000, *SIZE, seeded())
    distances = torch.cdist(images.flatten(1), tokenizer.decode(codes).flatten(1))
    counts = torch.bincount(distances.argmin(1), minlength=64)
    errors = (counts - 20_000 * expected).square() / (20_000 * expected)
    often = expected > 1e-3
    assert errors[often].sum() < 2 * often.sum()


def test_a_code_depends_on_nothing_that_comes_after_it() -> None:
    tokenizer = tokenizer_of(with_prior(HYBRID))
    prior = tokenizer.code_prior
    assert prior is not None
    indices = tokenizer.encode(random_images(batch=1, side=32))
    before = tokenizer.log_probabilities(indices)
    for number, layer in ((0, 0), (0, 1), (1, 0), (1, 2)):
        order = prior.order(*indices[number].shape[2:])
        for step in range(4):
            changed = [group.clone() for group in indices]
            own = changed[number][:, layer]
            sizes = tokenizer.config.groups[number].codebook_sizes
            own.copy_(torch.where(order >= step, (own + 1) % sizes[layer], own))
            after = tokenizer.log_probabilities(changed)
            earlier = [*itertools.chain(*before[:number]), *before[number][:layer]]
            for one, other in zip(earlier, itertools.chain(*after), strict=False):
                assert torch.equal(one, other)
            now = order <= step
            one, other = (own_layers[number][layer] for own_layers in (before, after))
            assert torch.equal(one[:, now], other[:, now])
            assert not torch.equal(before[1][2], after[1][2]) or (number, layer, step) == (1, 2, 3)


def test_a_uniform_prior_gives_the_bound_without_one() -> None:
    images = random_images()
    plain, coded = (make_tokenizer(config).eval() for config in (HYBRID, with_prior(HYBRID)))
    coded.load_state_dict(plain.state_dict(), strict=False)
    bounds = [own.evidence_lower_bound(images, 0.1, seeded()).nats for own in (plain, coded)]
    torch.testing.assert_close(*bounds)
    assert "code_prior" not in " ".join(plain.state_dict())
    assert coded.identity_hash() == plain.identity_hash()


def test_missing_layers_are_filled_with_the_most_likely_codes() -> None:
    tokenizer = tokenizer_of(with_prior(HYBRID))
    assert tokenizer.code_prior is not None
    indices = tokenizer.encode(random_images())
    for num_layers in range(1, 6):
        filled = tokenizer.code_prior.completed(
            tokenizer.top_down, indices, num_layers, most_likely
        )
        assert torch.equal(tokenizer.decode(indices, num_layers), tokenizer.decode(filled))
        kept = torch.cat([group.flatten(2).sum(2) for group in filled], 1)[:, :num_layers]
        expected = torch.cat([group.flatten(2).sum(2) for group in indices], 1)[:, :num_layers]
        assert torch.equal(kept, expected)
    log_probabilities = tokenizer.log_probabilities([*filled[:1], indices[1]])
    first = tokenizer.code_prior.completed(tokenizer.top_down, indices, 2, most_likely)
    is_first = tokenizer.code_prior.order(*first[1].shape[2:]) == 0
    expected = log_probabilities[1][0].argmax(-1)[:, is_first]
    assert torch.equal(first[1][:, 0][:, is_first], expected)


def exact_fit(tokenizer: Tokenizer, indices: Sequence[Tensor], latents: Sequence[Tensor]) -> float:
    """Σ CE(P, p) of all layers and positions, mean over the images."""
    found = zip(
        itertools.chain(*tokenizer.log_posteriors(latents, indices)),
        itertools.chain(*tokenizer.log_probabilities(indices)),
        strict=True,
    )
    total = sum(-(posterior.exp() * length).sum() for posterior, length in found)
    return float(total) / len(indices[0])


def test_the_terms_are_on_average_the_cross_entropy_of_all_codes() -> None:
    tokenizer = tokenizer_of(with_prior(HYBRID))
    assert tokenizer.code_prior is not None
    encoding = tokenizer.encode_with_latents(random_images(batch=6))
    with torch.no_grad():
        draws = [tokenizer.code_prior.terms(tokenizer.top_down, *encoding).fit for _ in range(100)]
    mean, error = torch.stack(draws).mean(), torch.stack(draws).std() / 10
    exact = exact_fit(tokenizer, *encoding)
    assert abs(mean.item() - exact) < 4 * error.item()
    assert error.item() < 0.1 * exact
    with torch.no_grad():
        hard = [
            tokenizer.code_prior.terms(tokenizer.top_down, encoding.indices, None).fit
            for _ in range(100)
        ]
    bits = tokenizer.code_length(encoding.indices).sum(1).mean().item() * math.log(2)
    assert torch.stack(hard).mean().item() == pytest.approx(bits, rel=0.2)


@pytest.mark.parametrize("config", [HYBRID, BASELINE], ids=["stochastic", "nearest"])
def test_each_term_has_a_gradient_of_its_own(config: TokenizerConfig) -> None:
    tokenizer = make_tokenizer(with_prior(config))
    assert tokenizer.eval()(random_images()).code_terms is None
    tokenizer.train()
    with torch.no_grad():
        for parameter in tokenizer.code_prior.parameters():  # type: ignore[union-attr]
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
    for name in ("rate", "fit"):
        tokenizer.zero_grad()
        term = getattr(tokenizer(random_images(batch=8)).code_terms, name)
        if config is BASELINE and name == "rate":
            assert not term.requires_grad
            continue
        term.backward()
        reached = {name for name, own in tokenizer.named_parameters() if own.grad is not None}
        heads = {name for name in reached if name.startswith("code_prior.")}
        assert (heads == set()) if name == "rate" else (heads == reached)
        if name == "rate":
            assert {"top_down.groups.0.quantizer.codebooks.0", "bottom_up.stem.weight"} <= reached


def test_a_search_counts_the_lengths_of_the_own_prior() -> None:
    tokenizer, images = tokenizer_of(with_prior(HYBRID)), random_images(batch=3)
    greedy = tokenizer.encode(images)
    variance = 0.2
    found = tokenizer.encode(images, SearchConfig(rate_weight=1.0, decoder_variance=variance))

    def objective(indices: Sequence[Tensor]) -> Tensor:
        nats = tokenizer.code_length(indices).sum(1) * math.log(2)
        return squared_errors(tokenizer, images, indices) / (2 * variance) + nats

    assert (objective(found) < objective(greedy)).all()
    assert tokenizer.code_length(found).sum() < tokenizer.code_length(greedy).sum()


def test_without_a_prior_what_needs_one_is_refused() -> None:
    tokenizer = make_tokenizer(HYBRID).eval()
    for call in (
        lambda: tokenizer.sample(1, 8, 8),
        lambda: tokenizer.code_length(random_images()),
    ):
        with pytest.raises(InputError, match=r"code_prior\.width must be > 0 for this"):
            call()
    with pytest.raises(InputError, match="image size must be divisible"):
        tokenizer_of(HQ).sample(1, 7, 8)
    assert decoding_of(tokenizer).configs == HYBRID.groups
