"""Which parameters decay, and how fast each learns."""

import pytest
import torch

from pipelines.config import TrainingConfig
from pipelines.training.optimizer import make_optimizer, set_learning_rate
from tokenizer import Tokenizer
from tokenizer.builders import deterministic, sq_vae_2
from tokenizer.config import NetworkConfig, TokenizerConfig
from tokenizer.quantizers import StochasticQuantizerConfig

NETWORKS = NetworkConfig(patch_size=2, width=8, max_width=8, num_blocks=1)


def config(**quantizer: float) -> TokenizerConfig:
    base = sq_vae_2((8, 4), 4, 3, networks=NETWORKS)
    return base.model_copy(update={"quantizer": StochasticQuantizerConfig(**quantizer)})


def rates_by_name(tokenizer: Tokenizer, rate: float) -> dict[str, float]:
    optimizer = make_optimizer(tokenizer, TrainingConfig(learning_rate=0.5))
    set_learning_rate(optimizer, rate)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in tokenizer.named_parameters()}


def test_codebooks_and_variances_learn_at_their_own_rates() -> None:
    tokenizer = Tokenizer(config(codebook_rate=7.0, variance_rate=3.0))
    for name, rate in rates_by_name(tokenizer, 0.01).items():
        factor = 7.0 if ".codebooks." in name else 3.0 if name.endswith("log_variances") else 1.0
        assert rate == pytest.approx(0.01 * factor), name


def test_the_baselines_learn_at_one_rate() -> None:
    assert set(rates_by_name(Tokenizer(deterministic(config())), 0.01).values()) == {0.01}


def test_a_variance_rate_of_zero_keeps_the_variances() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(config(variance_rate=0.0))
    tokenizer.total_steps = 2
    before = tokenizer.dequantization_variances().clone()
    optimizer = make_optimizer(tokenizer, TrainingConfig())
    set_learning_rate(optimizer, 0.1)
    tokenizer(torch.rand(2, 3, 16, 16) * 2 - 1, 0).loss.backward()
    optimizer.step()
    assert torch.equal(tokenizer.dequantization_variances(), before)


def test_decay_spares_codebooks_variances_and_vectors() -> None:
    tokenizer = Tokenizer(config())
    optimizer = make_optimizer(tokenizer, TrainingConfig(weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    spared = tokenizer.no_weight_decay()
    for name, parameter in tokenizer.named_parameters():
        expected = 0.1 if parameter.ndim > 1 and name not in spared else 0.0
        assert decays[id(parameter)] == expected, name


def test_the_weight_of_the_latent_terms_scales_them_alone() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(1)
        tokenizer = Tokenizer(config(latent_weight=weight))
        tokenizer.total_steps = 2
        output = tokenizer(images, 0)
        latents = output.quantization_error - output.posterior_entropy
        torch.testing.assert_close(output.loss, output.reconstruction + weight * latents)
        losses.append(output.loss.item())
    assert losses[0] != losses[1]
