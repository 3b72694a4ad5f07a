"""What the benchmark of drawing compares does the same work."""

import pytest
import torch

from benchmarks.speed.library_cache import LibraryCache
from benchmarks.speed.sampling import NoCache, comparisons
from prior import Condition, IncrementalDecoder
from tests.prior.small_priors import assert_close, random_indices, trained_prior


@pytest.mark.parametrize("order", ["coarse_to_fine", "cell"])
def test_all_caches_give_the_same_logits(order: str) -> None:
    prior = trained_prior(order, condition="none")
    codes = prior.ordering.flatten(random_indices(prior, 2))
    with torch.no_grad():
        decoder = IncrementalDecoder(prior, Condition(), 2)
        caches = [decoder, LibraryCache(prior, 2), NoCache(prior, 2)]
    for step, slot in prior.ordering.mask.nonzero().tolist():
        with torch.no_grad():
            first, *others = [cache.next_logits() for cache in caches]
        for logits in others:
            assert_close([logits], [first], 1e-5)
        with torch.no_grad():
            for cache in caches:
                cache.append(codes[:, step, slot])


def test_all_contenders_run_at_the_tiny_budget() -> None:
    for comparison in comparisons("tiny"):
        assert next(iter(comparison.contenders)) == "static cache"
        assert comparison.details["bytes_moved"] > 4 * comparison.details["parameters"]
        for set_up in comparison.contenders.values():
            set_up()()
