"""Measurements of a run: complete, stored with their protocol, and refused where impossible."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from pipelines.command_configs import EvaluationConfig, ExtractorConfig
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.data.sources import load_images
from pipelines.evaluate import table, write_results
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.features import FeatureExtractor, load_extractor
from pipelines.evaluation.measurements import Results, evaluate_generation
from pipelines.evaluation.metrics import frechet_distance
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.reconstruction import evaluate_reconstruction
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import to_float
from pipelines.sampling_config import SamplingConfig
from pipelines.train_tokenizer import train_tokenizer
from tests.tiny_runs import tokenizer_run
from tokenizer import Tokenizer
from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.storage.errors import InputError

GENERATION = ("FD", "IS", "KID", "precision", "recall")
RECONSTRUCTION = {
    "RMSE",
    "PSNR",
    "SSIM",
    "num_exact_images",
    "perplexity",
    "codebook_usage",
    "nominal_bits",
    "marginal_bits",
    "bound_bits_per_dim",
    "rFD-test_resnet",
    "rFD-test_resnet floor",
}


@pytest.fixture(scope="module")
def splits(cache_dir: Path) -> tuple[ImageDataset, ImageDataset]:
    data = tokenizer_run(Path(), cache_dir).data
    return load_images(data, "train"), load_images(data, "validation")


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    """A small untrained network: enough to see what is compared with what."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return load_extractor(
        ExtractorConfig(kind="timm", model="test_resnet", weights=path, image_size=32)
    )


@pytest.fixture(scope="module")
def measure(
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
    extractor: FeatureExtractor,
) -> Callable[..., Results]:
    """Measures generations with the given options, or reconstructions of a tokenizer."""

    def run(
        tokenizer: Tokenizer | None = None, by: FeatureExtractor = extractor, **options: object
    ) -> Results:
        others = (*splits, by, EvaluationConfig(**options), Accelerator())
        if tokenizer is not None:
            return evaluate_reconstruction(tokenizer, *others)
        return evaluate_generation(pipeline, *others)

    return run


@pytest.fixture(scope="module")
def results(measure: Callable[..., Results]) -> Results:
    return measure(num_images=32, seed=5)


def test_generations_are_measured_under_the_extractors_own_name(results: Results) -> None:
    names = {f"{name}-test_resnet" for name in GENERATION} | {"FD-test_resnet floor"}
    assert results.keys() == names
    assert all(math.isfinite(entry["value"]) for entry in results.values())


def test_each_number_carries_its_protocol(
    results: Results,
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
    extractor: FeatureExtractor,
) -> None:
    protocol = results["FD-test_resnet"]["protocol"]
    assert protocol["reference"] == splits[0].description
    assert protocol["reference_hash"] == splits[0].fingerprint
    assert protocol["num_reference_images"] == protocol["num_images"] == 32
    assert protocol["seed"] == 5
    assert protocol["extractor"] == extractor.protocol
    as_learned = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    assert protocol["sampling"] == as_learned
    assert protocol["settings"]["tokenizer_hash"] == pipeline.tokenizer.content_hash()
    assert protocol["settings"]["prior_hash"] == pipeline.prior.content_hash()
    assert protocol["settings"]["KID_subset_size"] == 32
    assert {"torch", "torch-fidelity", "torchvision", "timm"} <= protocol["versions"].keys()
    stored = Protocol.model_validate_json(json.dumps(protocol))
    assert stored.model_dump(mode="json") == json.loads(json.dumps(protocol))


def test_the_distance_is_that_of_the_images_that_generate_would_write(
    results: Results,
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
    extractor: FeatureExtractor,
) -> None:
    items = chosen_items(len(splits[0]), 32, 5)
    labels = splits[0].labels[items].tolist()
    images = pipeline(32, labels, seed=5, output="tensor", progress=False)
    reference = splits[0].images_at(items)
    distance = frechet_distance(extractor(images).features, extractor(reference).features)
    assert results["FD-test_resnet"]["value"] == pytest.approx(distance, rel=1e-4)


def test_the_floor_compares_the_other_split_at_the_same_number(
    results: Results, splits: tuple[ImageDataset, ImageDataset], extractor: FeatureExtractor
) -> None:
    entry = results["FD-test_resnet floor"]
    assert entry["protocol"]["num_images"] == 32
    assert entry["protocol"]["sampling"] == {}
    assert entry["protocol"]["settings"]["images_hash"] == splits[1].fingerprint
    one, other = (own.images_at(chosen_items(len(own), 32, 5)) for own in splits)
    floor = frechet_distance(extractor(other).features, extractor(one).features)
    assert entry["value"] == pytest.approx(floor, rel=1e-4)
    assert entry["value"] < results["FD-test_resnet"]["value"]


def test_generations_may_be_compared_with_the_validation_images(
    measure: Callable[..., Results], splits: tuple[ImageDataset, ImageDataset]
) -> None:
    sampling = SamplingConfig(temperature=(1.0, 0.9, 0.8), top_k=(None, 4, 4))
    results = measure(num_images=20, reference="validation", sampling=sampling)
    protocol = results["FD-test_resnet"]["protocol"]
    assert protocol["reference_hash"] == splits[1].fingerprint
    assert protocol["sampling"]["temperature"] == [1.0, 0.9, 0.8]
    assert protocol["sampling"]["top_k"] == [None, 4, 4]


@pytest.mark.parametrize("num_images", [1, 19])
def test_too_few_images_are_refused_before_any_is_drawn(
    num_images: int, measure: Callable[..., Results]
) -> None:
    with pytest.raises(InputError, match=f"num_images must be >= 20 .*, got {num_images}"):
        measure(num_images=num_images)


def test_reconstructions_are_measured_on_the_validation_images(
    measure: Callable[..., Results],
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
) -> None:
    results = measure(pipeline.tokenizer)
    assert results.keys() == RECONSTRUCTION
    protocol = results["RMSE"]["protocol"]
    assert protocol["reference_hash"] == splits[1].fingerprint
    assert protocol["num_images"] == 32
    assert protocol["sampling"] == {}
    assert results["nominal_bits"]["value"] == 3 * (2 * 4 + 16)
    assert results["marginal_bits"]["value"] <= results["nominal_bits"]["value"]
    assert len(results["perplexity"]["value"]) == 3
    images = splits[1].images_at(chosen_items(len(splits[1]), 32, 0))
    decoded = (pipeline.reconstruct(to_float(images)) + 1) * 127.5
    errors = (decoded.round().clamp(0, 255) - images.float()) / 255
    assert results["RMSE"]["value"] == pytest.approx(errors.square().mean().sqrt().item())
    json.dumps(results)


def test_bits_under_the_tokenizers_own_prior_are_those_of_its_hard_codes(
    measure: Callable[..., Results],
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
) -> None:
    prior = CodePriorConfig(width=8)
    tokenizer = Tokenizer(pipeline.tokenizer.config.model_copy(update={"code_prior": prior})).eval()
    for name, parameter in tokenizer.code_prior.named_parameters():  # type: ignore[union-attr]
        if name.endswith("4.bias"):  # of the last layers, which start from equal probabilities
            torch.nn.init.normal_(parameter)
    results = measure(tokenizer)
    assert results.keys() == RECONSTRUCTION | {"own_prior_bits"}
    images = to_float(splits[1].images_at(np.arange(len(splits[1]))))
    expected = tokenizer.code_length(images).sum(1).mean().item()
    assert results["own_prior_bits"]["value"] == pytest.approx(expected)
    assert expected != pytest.approx(results["nominal_bits"]["value"], rel=0.01)


def test_a_baseline_has_the_bound_of_its_nearest_codes(
    measure: Callable[..., Results], tmp_path: Path, cache_dir: Path
) -> None:
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, "tiny-baseline", total_steps=1))
    results = measure(Tokenizer.from_pretrained(tmp_path / "tokenizer" / "model"))
    assert results.keys() == RECONSTRUCTION
    settings = results["bound_bits_per_dim"]["protocol"]["settings"]
    assert settings["approximate_posterior"] == "a point mass at the nearest codes"


def test_images_are_chosen_by_the_seed_each_once(
    splits: tuple[ImageDataset, ImageDataset],
) -> None:
    items = chosen_items(len(splits[0]), 20, 3)
    assert len(set(items.tolist())) == 20
    assert items.tolist() == chosen_items(len(splits[0]), 20, 3).tolist()
    assert items.tolist() == chosen_items(len(splits[0]), 64, 3)[:20].tolist()
    assert items.tolist() != chosen_items(len(splits[0]), 20, 4).tolist()


def test_an_own_classifier_says_what_share_is_of_the_class_asked_for(
    measure: Callable[..., Results], splits: tuple[ImageDataset, ImageDataset]
) -> None:
    classifier = train_classifier(splits[0], 60, Accelerator())
    results = measure(by=classifier, num_images=32)
    agreement = results["class agreement-OwnClassifier"]["value"]
    of_real_images = results["class agreement-OwnClassifier of real images"]["value"]
    assert 0 <= agreement <= 1
    assert of_real_images > 2 / 8  # twice what guessing gives
    protocol = results["FD-OwnClassifier"]["protocol"]
    assert protocol["extractor"]["trained_on_hash"] == splits[0].fingerprint
    assert not any("FID" in name for name in results)


def test_results_are_written_and_shown(results: Results, tmp_path: Path) -> None:
    write_results(
        tmp_path / "evaluation", "python -m pipelines.evaluate x", {"generation": results}
    )
    written = json.loads((tmp_path / "evaluation" / "generation.json").read_text())
    assert written == {"command": "python -m pipelines.evaluate x", "metrics": results}
    lines = table({"generation": results}).splitlines()
    assert lines[0] == "generation"
    assert len(lines) == 1 + len(results) + 1
    assert lines[1].endswith(" N = 32")
    assert lines[-1].startswith("  FD-test_resnet, FD-test_resnet floor: 32 images are too few")
