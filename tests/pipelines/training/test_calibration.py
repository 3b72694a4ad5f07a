"""Stage one with a prior inside the tokenizer: its loss, its calibration, its place in a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import TokenizerRunConfig
from pipelines.data.sources import load_images
from pipelines.images import to_float
from pipelines.recipe import CodePriorRecipe
from pipelines.run.log import read_metrics
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.calibration import calibrate_code_prior
from tests.tiny_runs import CrashError, assert_same_run, crash, tokenizer_run, train_with
from tokenizer import Tokenizer
from tokenizer.code_prior_config import CodePriorConfig


def run_with_prior(run_dir: Path, cache_dir: Path) -> TokenizerRunConfig:
    run = tokenizer_run(run_dir, cache_dir, total_steps=4, checkpoint_interval=2)
    prior = CodePriorConfig(width=8)
    recipe = CodePriorRecipe(calibration_steps=3)
    return run.model_copy(
        update={
            "tokenizer": run.tokenizer.model_copy(update={"code_prior": prior}),
            "recipe": run.recipe.model_copy(update={"code_prior": recipe}),
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run with a prior inside; read it only."""
    folder = tmp_path_factory.mktemp("with_prior")
    train_tokenizer(run_with_prior(folder, cache_dir))
    return folder


def test_a_resumed_run_with_a_prior_equals_the_uninterrupted_run(
    trained: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = run_with_prior(tmp_path / "resumed", cache_dir)
    with pytest.raises(CrashError):
        train_with(config, 3, crash)
    train_tokenizer(config)
    assert_same_run(config.output_dir, trained / "tokenizer")
    train_tokenizer(config)  # finished: not calibrated twice
    assert_same_run(config.output_dir, trained / "tokenizer")


def test_the_run_logs_code_lengths_and_saves_the_prior(trained: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(trained / "tokenizer" / "model")
    bits = read_metrics(trained / "tokenizer", "validation")["code_bits"][1]
    assert len(bits[-1]) == len(tokenizer.codebook_sizes)
    assert all(length > 0 for length in bits[-1])
    training = read_metrics(trained / "tokenizer", "train")
    assert np.isfinite(training["code_length"][1]).all()
    assert training["code_rate_weight"][1][-1] == pytest.approx(0.3)


def test_a_prior_that_only_learns_leaves_the_rest_as_it_is_bit_for_bit(
    cache_dir: Path, tmp_path: Path
) -> None:
    """Its gradient has a norm of its own, and is not counted in that of the others."""
    run = run_with_prior(tmp_path / "with", cache_dir)
    weights = []
    for name, width in (("with", 8), ("without", 0)):
        tokenizer = run.tokenizer.model_copy(update={"code_prior": CodePriorConfig(width=width)})
        recipe = run.recipe.model_copy(
            update={"code_prior": CodePriorRecipe(rate_weight=0.0, calibration_steps=0)}
        )
        parts = {"run_dir": tmp_path / name, "tokenizer": tokenizer, "recipe": recipe}
        train_tokenizer(run.model_copy(update=parts))
        weights.append(Tokenizer.from_pretrained(tmp_path / name / "tokenizer/model").state_dict())
        norms = read_metrics(tmp_path / name / "tokenizer", "train")["gradient_norm"][1]
        assert max(norms) > run.training.max_gradient_norm
    for weight_name, weight in weights[1].items():
        assert torch.equal(weight, weights[0][weight_name]), weight_name
    assert weights[0].keys() > weights[1].keys()


def test_calibration_lowers_the_code_length_and_touches_nothing_else(
    trained: Path, cache_dir: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(trained / "tokenizer" / "model")
    images = load_images(run_with_prior(Path(), cache_dir).data, "train")
    batch = to_float(images.images_at(np.arange(len(images))))
    before, weights = tokenizer.code_length(batch).sum(), tokenizer.state_dict()
    weights = {name: weight.clone() for name, weight in weights.items()}
    calibrate_code_prior(tokenizer, images, 30, 0, torch.device("cpu"))
    assert tokenizer.code_length(batch).sum() < 0.98 * before
    for name, weight in tokenizer.state_dict().items():
        assert torch.equal(weight, weights[name]) != name.startswith("code_prior."), name


def test_the_weight_of_the_code_length_rises_over_its_share_of_the_steps() -> None:
    recipe = CodePriorRecipe(rate_weight=2.0, ramp=0.5)
    weights = [recipe.rate_weight_at(step, 8) for step in range(8)]
    assert weights == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert CodePriorRecipe(ramp=0.0).rate_weight_at(0, 8) == 0.3
