"""What tuning finds, where it is kept, and what it changes."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from pipelines.command_configs import EvaluationConfig, ExtractorConfig, GenerateConfig
from pipelines.config import TokenizerRunConfig
from pipelines.data.sources import trained_images
from pipelines.evaluation import tuning
from pipelines.evaluation.features import load_extractor
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.evaluation.tuning import search
from pipelines.generate import generate
from pipelines.generation import ImageGenerationPipeline
from pipelines.run.folder import load_run
from pipelines.sampling_config import SamplingConfig
from pipelines.tune_sampling import tune_sampling
from pipelines.tuned_sampling import FILE, TunedSampling
from pipelines.tuning_config import TuneSamplingConfig
from tokenizer.storage.errors import InputError

SMALL = {"temperature": (0.5, 1.0), "guidance_scale": (1.0, 3.0), "top_p": (0.5, 1.0)}


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ExtractorConfig:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return ExtractorConfig(kind="timm", model="test_resnet", weights=path, image_size=32)


@pytest.fixture(scope="module")
def tuned_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, extractor: ExtractorConfig
) -> Path:
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny_run, run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "GRID", SMALL)
        tune_sampling(TuneSamplingConfig(run_dir=run_dir, num_images=20, extractor=extractor))
    return run_dir


def drawn(pipeline: ImageGenerationPipeline, **arguments: Any) -> torch.Tensor:
    images = pipeline(6, progress=False, output="tensor", **arguments)
    assert isinstance(images, torch.Tensor)
    return images


def given(tuned: TunedSampling) -> dict[str, float]:
    return {
        "temperature": tuned.temperature,
        "top_p": tuned.top_p or 1.0,
        "guidance_scale": tuned.guidance_scale,
    }


@pytest.mark.parametrize("lowest", [(0.4, 3.0), (1.1, 1.0), (0.8, 1.5)])
def test_the_search_finds_the_least_of_a_bowl(lowest: tuple[float, float]) -> None:
    grid = {name: tuning.GRID[name] for name in ("temperature", "guidance_scale")}

    def bowl(point: tuple[float, ...]) -> float:
        one, other = (a - b for a, b in zip(point, lowest, strict=True))
        return one**2 + 0.1 * other**2

    assert search(bowl, grid) == lowest
    assert search(lambda point: 0.0 if point == (1.0, 1.0) else 1.0, grid) == (1.0, 1.0)


def test_the_settings_found_have_the_least_distance_of_all_that_were_tried(
    tuned_run: Path, extractor: ExtractorConfig
) -> None:
    pipeline = ImageGenerationPipeline.from_pretrained(tuned_run)
    assert pipeline.tuned is not None
    run = load_run(TokenizerRunConfig, tuned_run / "tokenizer" / "config.json")
    splits = trained_images(run, tuned_run / "tokenizer", Accelerator())
    network = load_extractor(extractor)

    def distance(sampling: SamplingConfig) -> float:
        config = EvaluationConfig(num_images=20, seed=1, sampling=sampling)
        results = evaluate_generation(pipeline, *splits, network, config, Accelerator())
        value: float = results["FD-test_resnet"]["value"]
        return value

    best = pipeline.tuned.protocol["value"]
    assert distance(SamplingConfig(**given(pipeline.tuned))) == pytest.approx(best, rel=1e-6)
    for name, values in SMALL.items():
        for value in values:
            other = SamplingConfig(**{**given(pipeline.tuned), name: value})
            assert distance(other) >= best * (1 - 1e-6)


def test_what_is_not_given_is_as_tuned_and_what_is_given_wins(
    tiny_run: Path, tuned_run: Path, tmp_path: Path
) -> None:
    plain = ImageGenerationPipeline.from_pretrained(tiny_run)
    pipeline = ImageGenerationPipeline.from_pretrained(tuned_run)
    best = TunedSampling(temperature=0.5, top_p=0.9, guidance_scale=3.0, prior_hash="", protocol={})
    pipeline.tuned = best
    assert torch.equal(drawn(pipeline), drawn(plain, **given(best)))
    off = {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 1.0}
    assert torch.equal(drawn(pipeline, **off), drawn(plain))
    for name, value in off.items():
        expected = drawn(plain, **{**given(best), name: value})
        assert torch.equal(drawn(pipeline, **{name: value}), expected)
        assert not torch.equal(expected, drawn(pipeline))
    # Without a condition there is nothing to guide by.
    (image,) = pipeline.inpaint(pipeline(1, progress=False)[0], np.ones((16, 16)), progress=False)
    assert image.size == (16, 16)
    pipeline.save_pretrained(tmp_path / "saved")
    again = ImageGenerationPipeline.from_pretrained(tmp_path / "saved")
    assert again.tuned is not None
    assert given(again.tuned) == given(best)


def test_commands_draw_as_tuned_and_say_so(
    tuned_run: Path, tmp_path: Path, extractor: ExtractorConfig
) -> None:
    pipeline = ImageGenerationPipeline.from_pretrained(tuned_run)
    assert pipeline.tuned is not None
    generate(GenerateConfig(run_dir=tuned_run, output_dir=tmp_path, num_images=1))
    settings = json.loads((tmp_path / "settings.json").read_text())["sampling"]
    tuned = pipeline.tuned.model_dump(include={"temperature", "top_p", "guidance_scale"})
    assert settings == {**tuned, "top_k": None}
    run = load_run(TokenizerRunConfig, tuned_run / "tokenizer" / "config.json")
    splits = trained_images(run, tuned_run / "tokenizer", Accelerator())
    network = load_extractor(extractor)
    for sampling, is_tuned in itertools.zip_longest(
        (SamplingConfig(), SamplingConfig(temperature=1.0, top_p=1.0, guidance_scale=1.0)), (True,)
    ):
        config = EvaluationConfig(num_images=20, sampling=sampling)
        results = evaluate_generation(pipeline, *splits, network, config, Accelerator())
        protocol = results["FD-test_resnet"]["protocol"]["sampling"]
        assert protocol.get("tuned") == (pipeline.tuned.protocol if is_tuned else None)
    assert pipeline.tuned.protocol["metric"] == "FD-test_resnet"
    assert pipeline.tuned.protocol["num_images"] == 20


def test_what_was_tuned_for_other_weights_is_not_used(
    tuned_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tuned_run, run_dir)
    path = run_dir / "prior" / "model" / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "prior_hash": "0" * 64}))
    assert ImageGenerationPipeline.from_pretrained(run_dir).tuned is None
    assert "is of other weights, tune sampling again" in caplog.text
    path.write_text("{}")
    with pytest.raises(InputError, match=r"sampling\.json: temperature"):
        ImageGenerationPipeline.from_pretrained(run_dir)


def test_a_run_that_cannot_be_tuned_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(InputError, match="run_dir must hold a trained prior: there is no "):
        tune_sampling(TuneSamplingConfig(run_dir=tmp_path))
    nothing = ExtractorConfig(kind="none")
    with pytest.raises(InputError, match=r"extractor\.kind must be .*, got 'none'"):
        tune_sampling(TuneSamplingConfig(run_dir=tiny_run, extractor=nothing))


def test_too_few_images_are_refused_in_words_of_this_command(
    tiny_run: Path, extractor: ExtractorConfig
) -> None:
    config = TuneSamplingConfig(run_dir=tiny_run, extractor=extractor, num_images=19)
    with pytest.raises(InputError, match=r"^num_images must be >= 20, got 19 of 64 images$"):
        tune_sampling(config)
