"""Which parameters decay, how fast each learns, and how an optimizer is saved."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.config import TokenizerRecipe, TrainingConfig
from pipelines.training.optimizer import (
    Network,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from tokenizer import Tokenizer
from tokenizer.builders import deterministic, sq_vae_2
from tokenizer.config import NetworkConfig

CONFIG = sq_vae_2((8, 4), 4, 3, networks=NetworkConfig(patch_size=2, width=8, num_blocks=1))


@given(st.integers(1, 50), st.integers(1, 50))
def test_the_rate_rises_to_its_peak_and_a_cosine_ends_at_zero(warmup: int, rest: int) -> None:
    total = warmup + rest
    config = TrainingConfig(total_steps=total, warmup_steps=warmup, learning_rate=0.3)
    rates = [config.learning_rate_at(step) for step in range(total + 1)]
    assert rates[:warmup] == pytest.approx([0.3 * (n + 1) / warmup for n in range(warmup)])
    cosine = [0.15 + 0.15 * math.cos(math.pi * n / rest) for n in range(rest + 1)]
    assert rates[warmup:] == pytest.approx(cosine, abs=1e-12)
    constant = config.model_copy(update={"schedule": "constant"})
    assert {constant.learning_rate_at(step) for step in range(warmup, total)} == {0.3}


def options_by_name(tokenizer: Tokenizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay, in units of 0.01 and 1, with a recipe of its own."""
    factors = TokenizerRecipe(codebook_rate=7.0, variance_rate=3.0).rate_factors(
        tokenizer.learned_roles()
    )
    network = Network.from_config(tokenizer, TrainingConfig(weight_decay=1.0), factors)
    optimizer = make_optimizer(network)
    set_learning_rate(optimizer, 0.01)
    return {
        name: (group["lr"] / 0.01, group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_codebooks_and_variances_learn_at_rates_of_their_own_and_do_not_decay() -> None:
    tokenizer = Tokenizer(CONFIG)
    options = options_by_name(tokenizer)
    for name, parameter in tokenizer.named_parameters():
        factor = 7.0 if ".codebooks." in name else 3.0 if name.endswith("log_variances") else 1.0
        decay = 1.0 if parameter.ndim > 1 and factor == 1 else 0.0
        assert options[name] == (pytest.approx(factor), decay), name
    baseline = options_by_name(Tokenizer(deterministic(CONFIG)))
    assert {rate for rate, _ in baseline.values()} == {1.0}


def make(*names: str) -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
    start = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    weights = nn.ParameterDict({name: nn.Parameter(start.clone()) for name in names})
    return weights, make_optimizer(Network(weights, lambda step: 0.1, rate_factors={"b": 0.5}))


def take_step(weights: nn.ParameterDict, optimizer: torch.optim.Optimizer, scale: int) -> None:
    for number, name in enumerate("abc"):
        gradient = torch.arange(18.0).view_as(weights[name])
        weights[name].grad = torch.empty_like(weights[name]).copy_(gradient * (number + scale))
    optimizer.step()


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """By name: the order of the parameters may change. Layouts are those of the weights."""
    weights, optimizer = make(*"abc")
    take_step(weights, optimizer, 1)
    tensors = {name: own.contiguous() for name, own in optimizer_tensors(optimizer).items()}
    save_file(tensors, tmp_path / "optimizer.safetensors")
    others, restored = make(*"cba")
    others.load_state_dict(weights.state_dict())
    restore_optimizer(restored, load_file(tmp_path / "optimizer.safetensors"))
    for network in ((weights, optimizer), (others, restored)):
        take_step(*network, -2)
    assert all(torch.equal(others[name], weights[name]) for name in weights)
