"""What the training commands refuse, and when: before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.sources import load_images
from pipelines.data_config import CodesConfig, DataConfig
from pipelines.run.folder import locked
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.loop import make_accelerator, train
from pipelines.training.prior_stage import make_prior
from tests.image_files import save
from tests.tiny_runs import make_stage, prior_run, tokenizer_run, weight_files
from tokenizer import Tokenizer
from tokenizer.search_config import SearchConfig
from tokenizer.storage.errors import InputError


@pytest.fixture
def copy(tmp_path: Path, tiny_run: Path) -> Path:
    """A finished run of both stages, to be damaged."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def test_searched_codes_reach_the_prior_and_have_no_posterior(copy: Path) -> None:
    search = SearchConfig(candidates=4)
    run = prior_run(copy).model_copy(update={"run_dir": copy, "codes": CodesConfig(search=search)})
    shutil.rmtree(copy / "prior")
    stages = [make_stage(own) for own in (run, prior_run(copy))]
    assert (stages[0].codes.indices[0] != stages[1].codes.indices[0]).any()
    with pytest.raises(InputError, match=r"codes\.search\.candidates must be 1 for targets"):
        make_stage(run.model_copy(update={"targets": "posterior"}))


def test_another_config_in_the_same_folder_is_refused_naming_the_field(
    tiny_run: Path, cache_dir: Path
) -> None:
    before = weight_files(tiny_run / "tokenizer")
    with pytest.raises(InputError, match=r"another run: its training\.total_steps is 4, got 5"):
        train_tokenizer(tokenizer_run(tiny_run, cache_dir, total_steps=5))
    with pytest.raises(InputError, match=r"another run: its training\.seed is 0, got 1"):
        train_prior(prior_run(tiny_run, seed=1))
    assert weight_files(tiny_run / "tokenizer") == before


def test_a_damaged_config_and_lost_checkpoints_are_refused_with_a_way_out(
    copy: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(copy, cache_dir)
    (config.output_dir / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON.*; remove it to go on with"):
        train_tokenizer(config)
    shutil.rmtree(config.output_dir / "state")
    with pytest.raises(InputError, match="state is gone, so that"):
        train_tokenizer(config)


def test_a_run_does_not_change_over_to_other_data(copy: Path, cache_dir: Path) -> None:
    """Images in a folder, say, may change while the configuration stays."""
    config = tokenizer_run(copy, cache_dir)
    data = config.data.model_copy(update={"seed": 1})
    stage = make_stage(config.model_copy(update={"data": data}))
    with pytest.raises(InputError, match=r"run_dir: .* was trained with other training images"):
        train(stage, config, make_accelerator(config))
    path = copy / "tokenizer" / "config.json"
    fields = json.loads(path.read_text())
    fields["data"]["seed"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="tokenizer was trained with other training images"):
        train_prior(prior_run(copy))
    shutil.rmtree(copy / "tokenizer")
    train_tokenizer(tokenizer_run(copy, cache_dir, seed=1))
    with pytest.raises(InputError, match="was trained with other tokenizer weights"):
        train_prior(prior_run(copy))


def test_two_commands_do_not_train_in_one_folder(copy: Path, cache_dir: Path) -> None:
    config = tokenizer_run(copy, cache_dir)
    with locked(config.output_dir), pytest.raises(InputError, match="another process is training"):
        train_tokenizer(config)
    train_tokenizer(config)


@pytest.mark.parametrize(
    ("message", "data", "training"),
    [
        ("data.image_size must be >= 11", {"image_size": 8}, {}),
        (r"training\.batch_size must .*, got 4", {}, {"gradient_accumulation_steps": 3}),
        (r"training\.compile must be False: .* no C\+\+ compiler", {}, {"compile": True}),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(
    message: str,
    data: dict[str, object],
    training: dict[str, object],
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    config = tokenizer_run(tmp_path / "run", cache_dir, **training)
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    with pytest.raises(InputError, match=message):
        train_tokenizer(config)
    with pytest.raises(InputError, match="run_dir must hold a trained tokenizer"):
        train_prior(prior_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_prior_that_cannot_be_trained_is_refused_before_codes_are_extracted(
    tmp_path: Path, cache_dir: Path
) -> None:
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, "tiny-baseline", total_steps=1))
    config = prior_run(tmp_path)
    no_null_class = config.prior.model_copy(update={"label_dropout": 0.0})
    for message, changes in (
        (r"guidance_scale must be 1 .*", {"guidance_scale": 2.0, "is_class_conditional": False}),
        (r"guidance_scale must be 1 .*", {"guidance_scale": 2.0, "prior": no_null_class}),
        ("targets must be 'indices'", {"targets": "posterior"}),
    ):
        with pytest.raises(InputError, match=message):
            train_prior(config.model_copy(update=changes))
    assert not (tmp_path / "prior").exists()


def test_a_prior_over_an_unfinished_tokenizer_says_so(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_prior(prior_run(copy))
    assert "the tokenizer is at step" not in caplog.text
    shutil.rmtree(copy / "tokenizer" / "state" / "step_00000004")
    train_prior(prior_run(copy))
    assert "the tokenizer is at step 2 of 4: trained further" in caplog.text


def test_images_without_classes_name_the_option_that_does_without(
    tiny_run: Path, tmp_path: Path
) -> None:
    for number in range(2):
        save(tmp_path / "flat" / f"{number}.png", np.zeros((16, 16, 3), np.uint8))
    data = DataConfig(
        dataset="folder", root=tmp_path / "flat", image_size=16, cache_dir=tmp_path / "cache"
    )
    tokenizer = Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")
    with pytest.raises(InputError, match="give --no-is-class-conditional"):
        make_prior(prior_run(tiny_run), tokenizer, load_images(data, "train"))
