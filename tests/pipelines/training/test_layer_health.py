"""Warnings for layers that stop carrying information."""

import logging

import pytest
import torch

from pipelines.config import TokenizerRecipe
from pipelines.training.layer_health import LayerHealth, relative_variances
from tokenizer import Tokenizer, hq_vae
from tokenizer.builders import deterministic
from tokenizer.config import NetworkConfig

NETWORKS = NetworkConfig(width=4, max_width=4, num_blocks=1)
CONFIG = TokenizerRecipe(min_codebook_usage=0.5, min_perplexity=0.25, variance_band=(0.1, 10.0))


def test_the_relative_variance_is_that_of_the_codes_if_there_are_any_whatever_their_scale() -> None:
    tokenizer = Tokenizer(hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS))
    expected = [
        1 / own.var(0, correction=0).mean().item() for g in tokenizer.code_vectors() for own in g
    ]
    assert relative_variances(tokenizer) == pytest.approx(expected)
    with torch.no_grad():
        for group in tokenizer.top_down:
            group.quantizer.log_variances += 2 * torch.tensor(3.0).log()
            for codebook in group.quantizer.codebooks:
                codebook.mul_(3).add_(7)
    assert relative_variances(tokenizer) == pytest.approx(expected, rel=1e-4)
    assert relative_variances(Tokenizer(hq_vae((4,), (2,), 1, 4, networks=NETWORKS))) == [1.0, 1.0]
    assert relative_variances(Tokenizer(deterministic(tokenizer.config))) == []


def test_a_layer_beyond_a_limit_is_flagged_and_logged_once_per_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    health = LayerHealth(CONFIG)
    sound = ([8, 8], [1.0, 0.5], [8.0, 2.0], [0.1, 10.0])
    broken = ([8, 8], [1.0, 0.4], [1.0, 2.0], [0.09, 11.0])
    logs = []
    for figures in (sound, broken, broken, sound, broken):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            flags = health.check(*figures)
        assert flags == {
            "low_usage": [0.0, float(figures is broken)],
            "low_perplexity": [float(figures is broken), 0.0],
            "variance_out_of_band": [float(figures is broken)] * 2,
        }
        logs.append([record.getMessage() for record in caplog.records])
    assert logs == [[], logs[1], [], [], logs[1]]
    assert logs[1] == [
        "layer 2: low_usage: 0.4, below recipe.min-codebook-usage",
        "layer 1: low_perplexity: 0.125, below recipe.min-perplexity",
        "layer 1: variance_out_of_band: 0.09, below recipe.variance-band",
        "layer 2: variance_out_of_band: 11, above recipe.variance-band",
    ]
