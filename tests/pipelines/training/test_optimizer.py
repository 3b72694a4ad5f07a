"""Which parameters decay, and how fast each learns."""

import pytest
import torch

from pipelines.config import TokenizerRecipe, TrainingConfig
from pipelines.training.losses import Bound
from pipelines.training.optimizer import make_optimizer, set_learning_rate
from tests.tokenizer.tiny import BASELINE, HYBRID, random_images
from tokenizer import Tokenizer


def optimizer_of(
    tokenizer: Tokenizer, rate: float, weight_decay: float = 0.0, **recipe: float
) -> torch.optim.Optimizer:
    factors = TokenizerRecipe(**recipe).rate_factors(tokenizer.learned_roles())
    optimizer = make_optimizer(tokenizer, TrainingConfig(weight_decay=weight_decay), factors)
    set_learning_rate(optimizer, rate)
    return optimizer


def by_name(tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, key: str) -> dict[str, float]:
    by_id = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in tokenizer.named_parameters()}


def test_codebooks_and_variances_learn_at_their_own_rates() -> None:
    tokenizer = Tokenizer(HYBRID)
    optimizer = optimizer_of(tokenizer, 0.01, codebook_rate=7.0, variance_rate=3.0)
    for name, rate in by_name(tokenizer, optimizer, "lr").items():
        factor = 7.0 if ".codebooks." in name else 3.0 if name.endswith("log_variances") else 1.0
        assert rate == pytest.approx(0.01 * factor), name
    baseline = Tokenizer(BASELINE)
    assert set(by_name(baseline, optimizer_of(baseline, 0.01), "lr").values()) == {0.01}


def test_a_variance_rate_of_zero_keeps_the_variances() -> None:
    tokenizer, images = Tokenizer(HYBRID), random_images().float()
    before = tokenizer.dequantization_variances().clone()
    optimizer = optimizer_of(tokenizer, 0.1, variance_rate=0.0)
    Bound(TokenizerRecipe(), has_posterior=True)(images, tokenizer(images)).minimized.backward()
    optimizer.step()
    assert torch.equal(tokenizer.dequantization_variances(), before)


def test_decay_spares_codebooks_variances_and_vectors() -> None:
    tokenizer = Tokenizer(HYBRID)
    decays = by_name(tokenizer, optimizer_of(tokenizer, 0.1, weight_decay=0.1), "weight_decay")
    spared = tokenizer.no_weight_decay()
    for name, parameter in tokenizer.named_parameters():
        assert decays[name] == (0.1 if parameter.ndim > 1 and name not in spared else 0.0), name
