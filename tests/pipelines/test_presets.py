"""The presets: each fits together, and a baseline differs in the quantizer alone."""

import pytest

from pipelines.evaluation.metrics import MIN_IMAGES
from pipelines.evaluation.similarity import SSIM_WINDOW
from pipelines.presets import (
    PRIOR_PRESETS,
    TOKENIZER_PRESETS,
    describe_preset,
    smaller_preset,
)
from prior.ordering import CodeOrdering
from tokenizer.code_maps import code_maps_of
from tokenizer.config import NearestQuantizerConfig, StochasticQuantizerConfig

COUNTERPARTS = {
    "shapes32-vqvae2": "shapes32-sqvae2",
    "shapes32-rqvae": "shapes32-rsqvae",
    "cifar10-vqvae": "cifar10-sqvae",
    "cifar10-vqvae2": "cifar10-sqvae2",
    "cifar10-rqvae": "cifar10-rsqvae",
    "tiny-baseline": "tiny",
}


def test_both_stages_have_the_same_presets() -> None:
    assert TOKENIZER_PRESETS.keys() == PRIOR_PRESETS.keys()


@pytest.mark.parametrize("name", TOKENIZER_PRESETS)
def test_a_preset_fits_together(name: str) -> None:
    run, prior = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
    assert run.run_dir == prior.run_dir
    assert run.run_dir.name == name
    assert run.data.image_size % run.tokenizer.groups[0].downsampling == 0
    assert run.data.image_size >= SSIM_WINDOW
    assert run.data.channels == run.tokenizer.channels
    assert run.data.num_validation_images >= MIN_IMAGES
    for training in (run.training, prior.training):
        assert training.total_steps % training.checkpoint_interval == 0
        assert training.warmup_steps < training.total_steps
    maps = code_maps_of(run.tokenizer.groups, run.data.image_size, run.data.image_size)
    assert CodeOrdering(maps, prior.prior.order).num_steps > 0
    assert run.tokenizer.has_posterior or prior.targets == "indices"


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_baseline_differs_from_its_counterpart_in_the_quantizer_alone(name: str) -> None:
    baseline, counterpart = TOKENIZER_PRESETS[name], TOKENIZER_PRESETS[COUNTERPARTS[name]]
    assert baseline.tokenizer.quantizer == NearestQuantizerConfig()
    assert counterpart.tokenizer.quantizer == StochasticQuantizerConfig()
    exclude = {"run_dir": True, "tokenizer": {"quantizer"}}
    assert baseline.model_dump(exclude=exclude) == counterpart.model_dump(exclude=exclude)


def test_a_smaller_preset_is_never_the_same() -> None:
    small, prior = TOKENIZER_PRESETS["images64-small"], PRIOR_PRESETS["images64-small"]
    large = TOKENIZER_PRESETS["images256-sqvae2"]
    for size, networks, name in (
        (256, large.tokenizer.networks, "images128-small"),
        (100, large.tokenizer.networks, "images64-small"),
        (64, large.tokenizer.networks, "images64-small"),
        (64, small.tokenizer.networks, "images32-small"),
        (64, prior.prior, "images32-small"),
        (32, small.tokenizer.networks, ""),
        (16, large.tokenizer.networks, ""),
    ):
        assert smaller_preset(size, networks) == name


def test_a_preset_says_what_it_takes_on_two_cores_and_on_a_gpu() -> None:
    assert ", two cores ~" in describe_preset("cifar10-sqvae2")
    assert ", GPU ~" in describe_preset("cifar10-sqvae2")
