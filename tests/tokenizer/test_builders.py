"""Named configurations, and what configurations reject."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from tests.tokenizer.tiny import NETWORKS
from tokenizer import (
    InputError,
    TokenizerConfig,
    fsq_vae,
    hq_vae,
    rq_vae,
    rsq_vae,
    sq_vae,
    sq_vae_2,
    vq_vae,
    vq_vae_2,
)
from tokenizer.builders import deterministic
from tokenizer.config import (
    FiniteScalarQuantizerConfig,
    GroupConfig,
    NearestQuantizerConfig,
    NetworkConfig,
    StochasticQuantizerConfig,
)

Builder = Callable[..., TokenizerConfig]


@pytest.mark.parametrize(
    ("builder", "baseline"), [(sq_vae, vq_vae), (sq_vae_2, vq_vae_2), (rsq_vae, rq_vae)]
)
def test_a_baseline_differs_from_its_counterpart_in_the_quantizer_alone(
    builder: Builder, baseline: Builder
) -> None:
    arguments = {"codebook_size": 6, "code_dim": 4, "networks": NETWORKS, "channels": 1}
    for given_arguments in ({}, arguments):
        first, second = builder(**given_arguments), baseline(**given_arguments)
        assert isinstance(first.quantizer, StochasticQuantizerConfig)
        assert isinstance(second.quantizer, NearestQuantizerConfig)
        assert first.model_copy(update={"quantizer": second.quantizer}) == second
    parameters = [inspect.signature(own).parameters.values() for own in (builder, baseline)]
    assert [str(entry) for entry in parameters[0]] == [str(entry) for entry in parameters[1]]


def test_the_members_are_ends_of_the_hybrid() -> None:
    assert sq_vae(4, 512, 64) == hq_vae((4,), (1,), 512, 64)
    assert sq_vae_2((16, 8, 4), 32, 8) == hq_vae((16, 8, 4), (1, 1, 1), 32, 8)
    assert rsq_vae(4, 3, 32, 8) == hq_vae((4,), (3,), 32, 8)
    assert rsq_vae(4, 1, 512, 64) == sq_vae_2((4,), 512, 64) == sq_vae(4, 512, 64)
    shared = hq_vae((4,), (3,), 32, 8, shares_codebook=True)
    assert rsq_vae(4, 3, 32, 8, shares_codebook=True) == shared
    grid = fsq_vae(4, (4, 8), 8, depth=3)
    assert grid.quantizer == FiniteScalarQuantizerConfig(levels=(4, 8))
    assert grid.groups == rsq_vae(4, 3, 32, 8).groups
    quantizer = NearestQuantizerConfig(decay=0.9)
    assert deterministic(sq_vae(), quantizer).quantizer == quantizer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hq_vae((), ()), r"depths must be .* at least 1, got 0"),
        (lambda: hq_vae((8, 4), (2,)), r"depths must be as many as downsamplings, 2 .*, got 1"),
        (lambda: hq_vae((4, 8), (1, 1)), r"groups must go from coarse to fine.*\[4, 8\]"),
        (lambda: hq_vae((8, 8), (1, 1)), r"groups must go from coarse to fine.*\[8, 8\]"),
        (lambda: hq_vae((12, 4), (1, 1)), r"downsampling must be a power of two, got 12"),
        (lambda: hq_vae((0,), (1,)), r"downsampling: .*, got 0"),
        (lambda: hq_vae((8,), (0,)), r"depths must be > 0, got \(0,\)"),
        (lambda: rsq_vae(codebook_size=0), r"^codebook_size: .* greater than 0, got 0$"),
        (lambda: sq_vae(code_dim=0), r"code_dim: .*, got 0"),
        (lambda: sq_vae(channels=0), r"channels: .*, got 0"),
        (lambda: sq_vae(channels=5), r"channels: .*, got 5"),
        (
            lambda: sq_vae(2, networks=NetworkConfig(patch_size=4)),
            r"networks.patch_size must be .* at most the finest downsampling 2, got 4",
        ),
        (lambda: sq_vae(networks=NetworkConfig(patch_size=3)), r"networks.patch_size .* got 3"),
        (
            lambda: sq_vae(4, networks=NetworkConfig(attention_downsampling=(8, 1, 4))),
            r"networks.attention_downsampling .* got \[1, 8\]",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused_by_its_name(
    build: Callable[[], object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (
            GroupConfig,
            {"downsampling": 4, "codebook_sizes": (4, 5), "shares_codebook": True},
            r"codebook_sizes must be equal where shares_codebook is set, got \(4, 5\)",
        ),
        (NetworkConfig, {"width": 0}, "width"),
        (StochasticQuantizerConfig, {"variance_factor": -1.0}, "variance_factor"),
        (StochasticQuantizerConfig, {"variance_factor": float("inf")}, "variance_factor"),
        (StochasticQuantizerConfig, {"noise_factor": -0.1}, "noise_factor"),
        (NearestQuantizerConfig, {"decay": 1.1}, "decay"),
        (NearestQuantizerConfig, {"restart_threshold": -1.0}, "restart_threshold"),
        (FiniteScalarQuantizerConfig, {"levels": ()}, "levels"),
        (FiniteScalarQuantizerConfig, {"levels": (1, 8)}, "levels"),
        (FiniteScalarQuantizerConfig, {"levels": (8, 513)}, "levels"),
        (
            TokenizerConfig,
            {**sq_vae(channels=1).model_dump(), "backbone": {"name": "resnet10t"}},
            r"channels must be 3 with a backbone, got 1",
        ),
        (TokenizerConfig, {**sq_vae().model_dump(), "chanels": 3}, "chanels"),
        (TokenizerConfig, {**sq_vae().model_dump(), "quantizer": {"kind": "fuzzy"}}, "quantizer"),
    ],
)
def test_an_invalid_configuration_names_its_field(
    config_class: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config_class.model_validate(fields)
