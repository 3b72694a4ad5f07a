"""The static cache beside the plain forward of x-transformers."""

import pytest
import torch
from torch import Tensor

from prior import Prior, PriorCache, PriorConfig, PriorNetworkConfig, Sampler, sample
from prior.sampling import sample_generators
from prior.static_transformer import StaticTransformer
from tests.prior.test_transformer import LAYOUTS, PYRAMID, every_logit, random_indices

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.float64, 1e-12, id="float64"),
    ],
)


def make_prior(
    order: str, positions: str = "learned", num_classes: int = 3, dropout: float = 0.1
) -> Prior:
    """One whose every parameter has moved, gains of norms and dropout included."""
    torch.manual_seed(0)
    network = PriorNetworkConfig.model_validate(
        {
            "width": 32,
            "body_depth": 2,
            "head_depth": 2,
            "num_heads": 4,
            "order": order,
            "positions": positions,
            "dropout": dropout,
        }
    )
    config = PriorConfig(network=network, code_maps=PYRAMID, num_classes=num_classes)
    prior = Prior(config).train()
    optimizer = torch.optim.Adam(prior.parameters(), 2e-2)
    labels = torch.tensor([0, 2, 1, 1]) if num_classes else None
    for _ in range(8):
        optimizer.zero_grad()
        prior(random_indices(prior, 4), labels).loss.backward()
        optimizer.step()
    return prior.eval()


def cached_logits(cache: PriorCache, indices: list[Tensor]) -> list[Tensor]:
    """The same from the cache."""
    ordering = cache.prior.ordering
    codes, logits = ordering.flatten(indices), []
    for step, slot in ordering.mask.nonzero().tolist():
        assert (cache.step, cache.slot) == (step, slot)
        logits.append(cache.next_logits())
        cache.append(codes[:, step, slot])
    return logits


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("num_classes", [0, 3])
@LAYOUTS
def test_cached_logits_equal_the_full_forward(
    order: str, positions: str, num_classes: int, dtype: torch.dtype, tolerance: float
) -> None:
    prior = make_prior(order, positions, num_classes).to(dtype)
    indices, labels = random_indices(prior, 3), torch.tensor([0, 2, 3])
    expected = every_logit(prior, indices, labels if num_classes else None)
    found = cached_logits(PriorCache(prior, labels), indices)
    assert_close(found, expected, tolerance)


@PRECISIONS
@LAYOUTS
def test_cached_logits_need_not_be_asked_for(
    order: str, positions: str, dtype: torch.dtype, tolerance: float
) -> None:
    prior = make_prior(order, positions).to(dtype)
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    expected = every_logit(prior, indices, labels)
    codes = prior.ordering.flatten(indices)
    cache = PriorCache(prior, labels)
    places = prior.ordering.mask.nonzero().tolist()
    for number, ((step, slot), logits) in enumerate(zip(places, expected, strict=True)):
        if number % 5 in (2, 4) or number > 18:
            assert_close([cache.next_logits()], [logits], tolerance)
        cache.append(codes[:, step, slot])


def test_a_strong_dropout_in_training_changes_nothing_in_use() -> None:
    prior = make_prior("cell", dropout=0.9)
    indices, labels = random_indices(prior, 2), torch.tensor([0, 2])
    expected = every_logit(prior, indices, labels)
    assert_close(cached_logits(PriorCache(prior, labels), indices), expected, 1e-5)


def test_a_cache_that_is_restarted_equals_a_new_one() -> None:
    prior = make_prior("coarse_to_fine")
    first, second = torch.tensor([0, 2]), torch.tensor([1, 3])
    cache = PriorCache(prior, first)
    cached_logits(cache, random_indices(prior, 2, seed=5))
    cache.restart(second)
    found = cached_logits(cache, random_indices(prior, 2))
    assert_close(found, cached_logits(PriorCache(prior, second), random_indices(prior, 2)), 0)


def test_known_codes_cost_no_step_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_prior("cell", num_classes=0)
    cache = PriorCache(prior, torch.zeros(2, dtype=torch.int64))
    calls: list[tuple[int, int]] = []
    take = StaticTransformer.__call__

    def counted(transformer: StaticTransformer, inputs: Tensor, first: int) -> Tensor:
        if transformer is cache._body:
            calls.append((inputs.shape[1], first))
        return take(transformer, inputs, first)

    monkeypatch.setattr(StaticTransformer, "__call__", counted)
    codes = prior.ordering.flatten(random_indices(prior, 2))
    for step in range(3):
        for slot in range(prior.ordering.num_slots):
            cache.append(codes[:, step, slot])
    assert calls == []
    cache.next_logits()
    assert calls == [(4, 0)]


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="promised with oneDNN")
@pytest.mark.parametrize("num_threads", [1, 2])
@LAYOUTS
def test_on_a_cpu_logits_do_not_depend_on_the_batch_bit_for_bit(
    order: str, positions: str, num_threads: int
) -> None:
    prior = make_prior(order, positions)
    indices, labels = random_indices(prior, 13), torch.arange(13) % 4
    previous = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = cached_logits(PriorCache(prior, labels), indices)
        for first, last in ((0, 1), (12, 13), (3, 5), (5, 8), (1, 6), (4, 12)):
            rows = slice(first, last)
            alone = cached_logits(PriorCache(prior, labels[rows]), [own[rows] for own in indices])
            assert_close(alone, [logits[rows] for logits in together], 0)
    finally:
        torch.set_num_threads(previous)


@LAYOUTS
def test_guided_codes_are_those_of_the_guided_forward(order: str, positions: str) -> None:
    prior = make_prior(order, positions)
    labels = torch.tensor([0, 2, 1])
    found = sample(prior, labels, sample_generators(0, range(3)), top_k=1, guidance_scale=3.0)
    with torch.no_grad():
        conditional, null = prior.logits(found, labels), prior.logits(found, torch.full((3,), 3))
    for group, own in enumerate(found):
        for layer in range(own.shape[1]):
            logits = null[group][layer] + 3 * (conditional[group][layer] - null[group][layer])
            torch.testing.assert_close(own[:, layer], logits.argmax(-1))


def test_batches_of_one_sampler_equal_samples_of_their_own() -> None:
    prior = make_prior("cell")
    sampler = Sampler(prior, temperature=0.8, guidance_scale=1.5)
    known = random_indices(prior, 2)
    known[1].fill_(-1)
    for first, last, given in ((0, 2, None), (2, 4, None), (4, 6, known), (6, 7, None)):
        labels = torch.arange(first, last) % 3
        found = sampler(labels, sample_generators(0, range(first, last)), known=given)
        expected = sample(
            prior,
            labels,
            sample_generators(0, range(first, last)),
            temperature=0.8,
            guidance_scale=1.5,
            known=given,
        )
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_autocast_does_not_change_the_codes() -> None:
    prior = make_prior("cell")
    labels = torch.tensor([0, 2, 1])
    expected = sample(prior, labels, sample_generators(0, range(3)))
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(prior, labels, sample_generators(0, range(3)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
