"""The search for codes: never worse, exact where everything is tried, independent of batches."""

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.tokenizer.tiny import HYBRID, KINDS, NETWORKS, make_tokenizer, random_images, seeded
from tokenizer import InputError, Tokenizer, TokenizerConfig, hq_vae, rsq_vae, sq_vae
from tokenizer import search as search_module
from tokenizer.search import search_codes
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.sensitivity import Decoding, Sensitivity, measure_sensitivities
from tokenizer.stacks import nearest_stacks

EVERY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
SEARCH = SearchConfig(candidates=6, beam=8)


class Marginals:
    """Costs of codes that do not depend on other codes: ascending with the index."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.groups = [
            [(-torch.arange(size) / 2).double().log_softmax(0) for size in group.codebook_sizes]
            for group in tokenizer.config.groups
        ]

    def log_probabilities(self, indices: Sequence[Tensor]) -> list[list[Tensor]]:
        return [
            [layer.expand(len(group), *group.shape[2:], -1) for layer in layers]
            for layers, group in zip(self.groups, indices, strict=True)
        ]

    def nats(self, indices: Sequence[Tensor]) -> Tensor:
        """Written down anew: of each image."""
        return -sum(
            layer[group[:, number]].sum((1, 2))
            for layers, group in zip(self.groups, indices, strict=True)
            for number, layer in enumerate(layers)
        )


@functools.cache
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    return make_tokenizer(config).eval()


def squared_errors(tokenizer: Tokenizer, images: Tensor, indices: Sequence[Tensor]) -> Tensor:
    return (tokenizer.decode(indices) - images).square().flatten(1).sum(1)


def decoding_of(tokenizer: Tokenizer) -> Decoding:
    return Decoding(tokenizer.top_down, tokenizer.decoder, tokenizer.config.groups)


def assert_equal_codes(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@EVERY_KIND
def test_no_image_gets_worse_and_some_get_better(config: TokenizerConfig) -> None:
    tokenizer, images = tokenizer_of(config), random_images(batch=5)
    before = squared_errors(tokenizer, images, tokenizer.encode(images))
    found = tokenizer.encode(images, SEARCH)
    after = squared_errors(tokenizer, images, found)
    assert (after <= before).all()
    assert (after < before).any()
    twice = squared_errors(tokenizer, images, tokenizer.encode(images, SearchConfig(sweeps=2)))
    assert (twice <= before).all()
    assert torch.equal(tokenizer.reconstruct(images, SEARCH), tokenizer.decode(found))


@EVERY_KIND
def test_one_candidate_leaves_the_encoders_codes(config: TokenizerConfig) -> None:
    tokenizer, images = tokenizer_of(config), random_images()
    for search in (NO_SEARCH, SearchConfig(candidates=1, sweeps=3)):
        assert_equal_codes(tokenizer.encode(images, search), tokenizer.encode(images))


@pytest.mark.parametrize("reach", [0, 1, None])
def test_no_image_gets_worse_where_changes_mix(
    reach: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, images = tokenizer_of(HYBRID), random_images(batch=5, side=16)

    def measured(decoding: Decoding) -> list[Sensitivity]:
        return [own._replace(reach=reach) for own in measure_sensitivities(decoding)]

    monkeypatch.setattr(search_module, "measure_sensitivities", measured)
    before = squared_errors(tokenizer, images, tokenizer.encode(images))
    after = squared_errors(tokenizer, images, tokenizer.encode(images, SEARCH))
    assert (after <= before).all()
    assert after.sum() < 0.99 * before.sum()


def every_code(tokenizer: Tokenizer, image: Tensor) -> list[Tensor]:
    """All assignments of codes to an image of few positions."""
    maps = tokenizer.code_maps(*image.shape[2:])
    shapes = [(own.depth, own.height, own.width) for own in maps]
    choices = [
        range(size)
        for own in maps
        for size in own.codebook_sizes
        for _ in range(own.height * own.width)
    ]
    rows = torch.tensor(list(itertools.product(*choices)))
    parts = rows.split([math.prod(shape) for shape in shapes], 1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


SMALL = {
    "SQ-VAE": (sq_vae(4, 3, 2, networks=NETWORKS, channels=1), (4, 8)),
    "RSQ-VAE": (rsq_vae(4, 2, 3, 2, networks=NETWORKS, channels=1), (4, 4)),
    "HQ-VAE": (hq_vae((8, 4), (2, 1), 2, 2, networks=NETWORKS, channels=1), (8, 8)),
}


@pytest.mark.parametrize(("config", "size"), SMALL.values(), ids=SMALL.keys())
def test_the_best_of_all_codes_is_a_lower_bound_and_a_fixed_point(
    config: TokenizerConfig, size: tuple[int, int]
) -> None:
    tokenizer = tokenizer_of(config)
    image = 2 * torch.rand(1, 1, *size, generator=seeded(), dtype=torch.float64) - 1
    codes = every_code(tokenizer, image)
    errors = squared_errors(tokenizer, image, codes)
    best = [group[errors.argmin()][None] for group in codes]
    found = tokenizer.encode(image, SearchConfig(sweeps=2))
    assert squared_errors(tokenizer, image, found).item() >= errors.min().item() * (1 - 1e-9)
    assert_equal_codes(search_codes(decoding_of(tokenizer), image, best, SEARCH), best)
    if size == (4, 4):  # one position, whose nine stacks are all tried
        assert_equal_codes(found, best)


def test_codes_do_not_depend_on_what_is_searched_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, images = tokenizer_of(HYBRID), random_images(batch=3)
    together = tokenizer.encode(images, SEARCH)
    assert_equal_codes(tokenizer.encode(images, SEARCH), together)
    alone = [tokenizer.encode(images[n : n + 1], SEARCH) for n in range(3)]
    assert_equal_codes([torch.cat(group) for group in zip(*alone, strict=True)], together)
    monkeypatch.setitem(search_module.PIXELS_AT_ONCE, "cpu", 2 * 6 * images[0, 0].numel())
    assert_equal_codes(tokenizer.encode(images, SEARCH), together)


@EVERY_KIND
def test_counted_costs_fall_with_their_weight(config: TokenizerConfig) -> None:
    tokenizer, images = tokenizer_of(config), random_images(batch=3)
    costs = Marginals(tokenizer)
    greedy = tokenizer.encode(images)
    variance = 0.2

    def objective(indices: Sequence[Tensor], weight: float) -> Tensor:
        errors = squared_errors(tokenizer, images, indices)
        return errors / (2 * variance) + weight * costs.nats(indices)

    nats = [costs.nats(greedy).sum()]
    for weight in (1.0, 1e4):
        search = SearchConfig(rate_weight=weight, decoder_variance=variance)
        found = tokenizer.encode(images, search, costs)
        assert (objective(found, weight) <= objective(greedy, weight)).all()
        nats.append(costs.nats(found).sum())
    assert nats[2] < nats[1] < nats[0]
    assert all((group == 0).all() for group in found)  # the cheapest of all


def test_what_is_counted_must_be_known() -> None:
    tokenizer, images = tokenizer_of(HYBRID), random_images()
    with pytest.raises(InputError, match="rate_weight must be 0 without costs"):
        tokenizer.encode(images, SearchConfig(rate_weight=1.0))
    with pytest.raises(InputError, match="rate_weight must be > 0 with costs"):
        tokenizer.encode(images, SearchConfig(), Marginals(tokenizer))


def test_the_search_works_within_inference_mode() -> None:
    tokenizer, images = tokenizer_of(HYBRID), random_images()
    with torch.inference_mode():
        found = tokenizer.encode(images, SEARCH)
    assert_equal_codes(found, tokenizer.encode(images, SEARCH))


# Sensitivities and stacks


def test_the_sensitivity_predicts_what_a_small_change_does_to_the_image() -> None:
    tokenizer = tokenizer_of(HYBRID)
    decoding = decoding_of(tokenizer)
    indices = tokenizer.encode(random_images(batch=8, side=32))
    with torch.no_grad():
        quantized = [
            group.quantized(own) for group, own in zip(decoding.top_down, indices, strict=True)
        ]
        base = decoding.images(quantized, None)
        change = 1e-4 * torch.randn(8, 4, generator=seeded(), dtype=torch.float64)
        changed = quantized[0].clone()
        changed[:, :, 2, 4] += change
        squares = (decoding.images([changed, quantized[1]], None) - base).square().sum()
    factor = measure_sensitivities(decoding)[0].factor
    assert (change @ factor).square().sum().item() == pytest.approx(squares.item(), rel=0.3)


def test_reach_is_that_of_the_convolutions_and_unbounded_with_attention() -> None:
    for attention, expected in (((), True), ((4,), False)):
        networks = NETWORKS.model_copy(update={"attention_downsampling": attention})
        tokenizer = make_tokenizer(sq_vae(4, 6, 4, networks=networks)).eval()
        for module in tokenizer.decoder.modules():
            if hasattr(module, "to_query_key_value"):
                with torch.no_grad():  # attends to all positions alike, and strongly
                    module.to_query_key_value.weight.mul_(0.01)
                    module.to_output.weight.mul_(1e5)
        (sensitivity,) = measure_sensitivities(decoding_of(tokenizer))
        assert (sensitivity.reach is not None) == expected


def test_stacks_are_the_best_of_all_with_a_beam_that_keeps_all() -> None:
    targets = torch.randn(7, 3, generator=seeded(), dtype=torch.float64)
    codebooks = [torch.randn(4, 3, generator=seeded(n), dtype=torch.float64) for n in range(3)]
    lengths = [torch.rand(7, 4, generator=seeded(n), dtype=torch.float64) for n in range(3)]
    precisions = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    sums = sum(codebook[every[:, n]] for n, codebook in enumerate(codebooks))
    distances = (targets[:, None] - sums).square().sum(2) * precisions[:, None] / 2
    for counted in (None, lengths):
        scores = distances.clone()
        for n, length in enumerate(counted or []):
            scores += length[:, every[:, n]]
        found = nearest_stacks(targets, codebooks, precisions, counted, 5, 64)
        assert torch.equal(found, every[scores.argsort(1)[:, :5]])
