"""What earlier versions have saved loads, goes on and generates the same images for ever.

`fixtures/v1` was written by commit 19c0523 and must not change: folders without a format number.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.command_configs import GenerateConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.generate import generate
from pipelines.run.folder import check_output_dir, load_run
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests.golden.runs import assert_same_metrics
from tests.tiny_runs import logged
from tokenizer import InputError, Tokenizer

V1 = Path(__file__).parent / "fixtures" / "v1"
EXPECTED: dict[str, Any] = json.loads((V1 / "expected.json").read_text())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_v1_pipeline(pipeline: ImageGenerationPipeline, images: torch.Tensor) -> None:
    """Codes, likelihoods and images are those of the version that saved it."""
    indices = pipeline.encode(images)
    assert [own.flatten(1).tolist() for own in indices] == EXPECTED["pipeline"]["codes"]
    log_prob = pipeline.prior.log_prob(indices, torch.tensor([0, 1, 2, 3])).tolist()
    assert log_prob == pytest.approx(EXPECTED["pipeline"]["log_prob"], rel=1e-5)
    generated = pipeline(4, labels=[0, 1, 2, 3], seed=0, progress=False, output="tensor")
    assert isinstance(generated, torch.Tensor)
    # A CPU of another model may round a byte otherwise.
    first = generated.flatten()[:64].tolist()
    assert first == pytest.approx(EXPECTED["pipeline"]["generated_bytes"], abs=1)


def test_a_pipeline_generates_the_same_images_and_so_does_its_copy(
    images: torch.Tensor, tmp_path: Path
) -> None:
    pipeline = ImageGenerationPipeline.from_pretrained(V1 / "pipeline")
    assert_v1_pipeline(pipeline, images)
    pipeline.save_pretrained(tmp_path)
    assert_v1_pipeline(ImageGenerationPipeline.from_pretrained(tmp_path), images)


def test_a_baseline_encodes_to_the_same_codes(images: torch.Tensor) -> None:
    tokenizer = Tokenizer.from_pretrained(V1 / "baseline")
    assert tokenizer.has_hash(EXPECTED["baseline"]["hash"])
    indices = tokenizer.encode(images)
    assert [own.flatten(1).tolist() for own in indices] == EXPECTED["baseline"]["codes"]


def assert_finished(folder: Path) -> None:
    """Metrics are those of the uninterrupted run, up to the rounding of later versions."""
    expected = EXPECTED["finished"][folder.name]["metrics"]
    lines = [{key: line[key] for key in line if key != "SSIM"} for line in expected]  # of borders
    assert_same_metrics(logged(folder), lines, is_exact=False)


def test_runs_of_both_stages_go_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # run and cache are relative folders
    tokenizer_dir, prior_dir = Path("run/tokenizer"), Path("run/prior")
    shutil.copytree(V1 / "tokenizer_run", "run")
    train_tokenizer(load_run(TokenizerRunConfig, tokenizer_dir / "config.json"))
    assert_finished(tokenizer_dir)
    shutil.rmtree("run")
    shutil.copytree(V1 / "prior_run", "run")
    train_prior(load_run(PriorRunConfig, prior_dir / "config.json"))
    assert_finished(prior_dir)
    assert len(list(prior_dir.glob("state/step_*"))) == 2  # it went on: the old one is kept
    ImageGenerationPipeline.from_pretrained("run")
    # Once more: what is written today is accepted as well.
    train_prior(load_run(PriorRunConfig, prior_dir / "config.json"))


def test_a_run_goes_on_with_a_field_that_it_did_not_know_at_its_default(tmp_path: Path) -> None:
    shutil.copytree(V1 / "tokenizer_run", tmp_path / "run")
    path = tmp_path / "run" / "tokenizer" / "config.json"
    fields = json.loads(path.read_text())
    del fields["training"]["beta2"]
    path.write_text(json.dumps(fields))
    config = load_run(TokenizerRunConfig, path).model_copy(update={"run_dir": tmp_path / "run"})
    check_output_dir(config)
    training = config.training.model_copy(update={"beta2": 0.5})
    with pytest.raises(InputError, match=r"its training\.beta2 is 0\.99, got 0\.5"):
        check_output_dir(config.model_copy(update={"training": training}))
    path.write_text(json.dumps({**fields, "format": 4}))
    with pytest.raises(InputError, match="format must be at most 3, got 4"):
        check_output_dir(config)


def test_a_series_of_images_goes_on(tmp_path: Path) -> None:
    # As 19c0523 wrote it.
    sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    hashes = {name: EXPECTED[f"{name}_hash"] for name in ("tokenizer", "prior")}
    settings = {**hashes, "labels": [], "seed": 0, "sampling": sampling}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    config = GenerateConfig(run_dir=V1 / "pipeline", output_dir=tmp_path, num_images=2)
    generate(config)
    generate(config.model_copy(update={"num_images": 3}))
    assert len(list(tmp_path.glob("0*.png"))) == 3
    settings["prior"] = "0" * 64
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="other settings: its prior is"):
        generate(config)
