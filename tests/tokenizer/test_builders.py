"""Named configurations, and what configurations reject."""

import inspect
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenizer import (
    InputError,
    Tokenizer,
    TokenizerConfig,
    hq_vae,
    rq_vae,
    rsq_vae,
    sq_vae,
    sq_vae_2,
    vq_vae,
    vq_vae_2,
)
from tokenizer.builders import deterministic
from tokenizer.config import CodeMapConfig, NetworkConfig
from tokenizer.quantizers import GroupConfig, NearestQuantizerConfig, StochasticQuantizerConfig

Builder = Callable[..., TokenizerConfig]
COUNTERPARTS: list[tuple[Builder, Builder]] = [
    (sq_vae, vq_vae),
    (sq_vae_2, vq_vae_2),
    (rsq_vae, rq_vae),
]
NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)


@pytest.mark.parametrize(("builder", "baseline"), COUNTERPARTS)
def test_a_baseline_differs_from_its_counterpart_in_the_quantizer_alone(
    builder: Builder, baseline: Builder
) -> None:
    arguments = {"codebook_size": 6, "code_dim": 4, "networks": NETWORKS, "channels": 1}
    for given_arguments in ({}, arguments):
        first, second = builder(**given_arguments), baseline(**given_arguments)
        assert isinstance(first.quantizer, StochasticQuantizerConfig)
        assert isinstance(second.quantizer, NearestQuantizerConfig)
        assert first.model_copy(update={"quantizer": second.quantizer}) == second
    first_defaults = inspect.signature(builder).parameters
    second_defaults = inspect.signature(baseline).parameters
    assert [str(entry) for entry in first_defaults.values()] == [
        str(entry) for entry in second_defaults.values()
    ]


@pytest.mark.parametrize(("builder", "baseline"), COUNTERPARTS)
def test_counterparts_have_the_same_networks_and_code_maps(
    builder: Builder, baseline: Builder
) -> None:
    arguments = {"codebook_size": 6, "code_dim": 4, "networks": NETWORKS}
    first, second = Tokenizer(builder(**arguments)), Tokenizer(baseline(**arguments))
    assert first.code_maps(32, 64) == second.code_maps(32, 64)
    names = [
        {name for name in entry.state_dict() if ".quantizer." not in name}
        for entry in (first, second)
    ]
    assert names[0] == names[1]


def test_the_members_are_ends_of_the_hybrid() -> None:
    assert sq_vae(4, 512, 64) == hq_vae((4,), (1,), 512, 64)
    assert sq_vae_2((16, 8, 4), 32, 8) == hq_vae((16, 8, 4), (1, 1, 1), 32, 8)
    assert rsq_vae(4, 3, 32, 8) == hq_vae((4,), (3,), 32, 8)
    assert rsq_vae(4, 1, 512, 64) == sq_vae(4, 512, 64)
    assert rsq_vae(4, 3, 32, 8, shares_codebook=True) == hq_vae(
        (4,), (3,), 32, 8, shares_codebook=True
    )


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_the_hybrid_has_the_given_depths_at_the_given_downsamplings(
    levels: list[tuple[int, int]], size: int
) -> None:
    depths = dict(sorted(levels, reverse=True))
    config = hq_vae([2**power for power in depths], list(depths.values()), size, 5)
    assert [group.downsampling for group in config.groups] == [2**power for power in depths]
    assert [group.num_layers for group in config.groups] == list(depths.values())
    assert all(set(group.codebook_sizes) == {size} for group in config.groups)


@pytest.mark.parametrize("builder", [hq_vae, sq_vae, sq_vae_2, rsq_vae, vq_vae, vq_vae_2, rq_vae])
def test_every_configuration_survives_json(builder: Builder) -> None:
    config = builder()
    assert TokenizerConfig.model_validate_json(config.model_dump_json()) == config
    assert TokenizerConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


def test_a_baseline_takes_the_given_quantizer() -> None:
    quantizer = NearestQuantizerConfig(decay=0.9)
    assert deterministic(sq_vae(), quantizer).quantizer == quantizer


def test_a_code_map_counts_its_layers() -> None:
    assert CodeMapConfig(height=2, width=3, codebook_sizes=(4, 5), code_dim=6).depth == 2


def test_as_many_depths_as_downsamplings_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"depths must be as many as downsamplings, 2 .*, got 1"):
        hq_vae((8, 4), (2,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hq_vae((), ()), r"depths must be .* at least 1, got 0"),
        (lambda: hq_vae((4, 8), (1, 1)), r"groups must go from coarse to fine.*\[4, 8\]"),
        (lambda: hq_vae((8, 8), (1, 1)), r"groups must go from coarse to fine.*\[8, 8\]"),
        (lambda: hq_vae((12, 4), (1, 1)), r"downsampling must be a power of two, got 12"),
        (lambda: hq_vae((0,), (1,)), r"downsampling: .*, got 0"),
        (lambda: hq_vae((8,), (0,)), r"depths must be > 0, got \(0,\)"),
        (
            lambda: rsq_vae(codebook_size=0),
            r"^codebook_size: Input should be greater than 0, got 0$",
        ),
        (lambda: sq_vae(code_dim=0), r"code_dim: .*, got 0"),
        (lambda: sq_vae(channels=0), r"channels: .*, got 0"),
        (lambda: sq_vae(channels=5), r"channels: .*, got 5"),
        (
            lambda: sq_vae(2, networks=NetworkConfig(patch_size=4)),
            r"networks.patch_size must be .* at most the finest downsampling 2, got 4",
        ),
        (lambda: sq_vae(networks=NetworkConfig(patch_size=3)), r"networks.patch_size .* got 3"),
        (
            lambda: sq_vae(4, networks=NetworkConfig(attention_downsampling=(8, 4))),
            r"networks.attention_downsampling .* got \[8\]",
        ),
        (
            lambda: sq_vae(4, networks=NetworkConfig(attention_downsampling=(1,))),
            r"networks.attention_downsampling .* got \[1\]",
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
    ("build", "message"),
    [
        (
            lambda: GroupConfig(downsampling=4, codebook_sizes=(4, 5), shares_codebook=True),
            r"codebook_sizes must be equal where shares_codebook is set, got \(4, 5\)",
        ),
        (lambda: NetworkConfig(width=0), r"width"),
        (lambda: StochasticQuantizerConfig(final_temperature=0.0), r"final_temperature"),
        (lambda: StochasticQuantizerConfig(variance_factor=-1.0), r"variance_factor"),
        (lambda: StochasticQuantizerConfig(variance_factor=float("inf")), r"variance_factor"),
        (lambda: StochasticQuantizerConfig(noise_factor=-0.1), r"noise_factor"),
        (lambda: NearestQuantizerConfig(decay=1.1), r"decay"),
        (lambda: NearestQuantizerConfig(restart_threshold=-1.0), r"restart_threshold"),
        (
            lambda: TokenizerConfig.model_validate(
                {**sq_vae(channels=1).model_dump(), "backbone": {"name": "resnet10t"}}
            ),
            r"channels must be 3 with a backbone, got 1",
        ),
        (
            lambda: TokenizerConfig.model_validate({**sq_vae().model_dump(), "chanels": 3}),
            r"chanels",
        ),
        (
            lambda: TokenizerConfig.model_validate(
                {**sq_vae().model_dump(), "quantizer": {"kind": "fuzzy"}}
            ),
            r"quantizer",
        ),
    ],
)
def test_an_invalid_configuration_names_its_field(
    build: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        build()
