"""What an evaluation says of itself: classes, numbers, floors, warnings, bounds, references."""

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from pipelines.command_configs import EvaluateConfig, EvaluationConfig, ExtractorConfig
from pipelines.config import DataConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.decoded_images import DecodedImages
from pipelines.data.sources import load_images
from pipelines.evaluate import evaluate, table
from pipelines.evaluation import features
from pipelines.evaluation.distances import Comparison
from pipelines.evaluation.features import (
    composite_on_white,
    load_extractor,
)
from pipelines.evaluation.judges import check_extractor
from pipelines.evaluation.measurements import compare_sets, evaluate_generation
from pipelines.evaluation.metrics import frechet_distance
from pipelines.evaluation.protocol import Protocol, compared_numbers
from pipelines.evaluation.reconstruction import evaluate_reconstruction
from pipelines.evaluation.reference import floor_of, load_statistics
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import to_float, to_uint8
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.report.explanation import write_explanation
from pipelines.report.summary import write_summary
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests.extractors import Colors
from tests.image_files import Malicious
from tests.tiny_runs import prior_run, tokenizer_run
from tokenizer import Tokenizer
from tokenizer.config import BackboneConfig
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.errors import InputError


def noise(num_images: int, seed: int = 0, channels: int = 3, **fields: Any) -> DecodedImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (num_images, 16, 16, channels), np.uint8)
    labels, name = np.zeros(num_images, np.int64), f"noise {seed}"
    default = DecodedImages(pixels, labels, (), fingerprint=name, description=name)
    return dataclasses.replace(default, **fields)


@pytest.fixture(scope="module")
def splits(cache_dir: Path) -> tuple[DecodedImages, DecodedImages]:
    data = tokenizer_run(Path(), cache_dir).data
    train, validation = load_images(data, "train"), load_images(data, "validation")
    assert isinstance(train, DecodedImages)
    assert isinstance(validation, DecodedImages)
    # Not the shares in which the classes would come in turn.
    labels = np.repeat([0, 1, 5], [40, 20, len(train) - 60])
    return dataclasses.replace(train, labels=labels), validation


# Which classes


def recorded_labels(
    pipeline: ImageGenerationPipeline,
    splits: tuple[DecodedImages, DecodedImages],
    monkeypatch: pytest.MonkeyPatch,
    reference: DecodedImages | None = None,
    **options: Any,
) -> tuple[list[int], str]:
    """The classes that an evaluation asks for, and what its protocol says of them."""
    asked: list[int] = []
    draw = pipeline.draw

    def record(rows: list[int], **settings: Any) -> Any:
        asked.extend(settings["labels"].tolist())
        return draw(rows, **settings)

    monkeypatch.setattr(pipeline, "draw", record)
    config = EvaluationConfig(num_images=25, **options)
    results = evaluate_generation(pipeline, *splits, Colors(), config, Accelerator(), reference)
    return asked, results["FD-Colors"]["protocol"]["settings"]["labels"]


def test_generated_images_have_the_classes_of_the_very_images_they_are_compared_with(
    pipeline: ImageGenerationPipeline,
    splits: tuple[DecodedImages, DecodedImages],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, validation = splits
    of_training = train.labels[chosen_items(len(train), 25)].tolist()
    numbers = np.repeat([0, 1], [8, len(validation) - 8])
    of_reference = numbers[chosen_items(len(numbers), 25)]
    names = np.array([train.class_names.index(name) for name in ("square", "disc")])

    def asked(**options: Any) -> tuple[list[int], str]:
        with monkeypatch.context() as context:
            return recorded_labels(pipeline, splits, context, **options)

    known = dataclasses.replace(validation, labels=numbers, class_names=("square", "disc"))
    unknown = dataclasses.replace(known, class_names=("cat", "dog"))
    assert asked() == (of_training, "those of the reference images")
    assert asked(labels="in_turn") == ([row % 8 for row in range(25)], "classes in turn")
    by_name = names[of_reference].tolist()
    assert asked(reference=known) == (by_name, "those of the reference images")
    assert asked(reference=unknown) == (of_training, "those of training images")


# How many images


@pytest.mark.parametrize(
    ("num_reference", "num_other", "count", "number", "is_part_of_reference"),
    [
        (198, 22, 22, 22, False),
        (198, 22, 198, 99, True),
        (400, 22, 198, 198, True),
        (198, 150, 198, 150, False),
        (50, 0, 50, 25, True),
    ],
)
def test_a_floor_has_as_many_disjoint_images_on_both_sides(
    num_reference: int, num_other: int, count: int, number: int, is_part_of_reference: bool
) -> None:
    reference, other = noise(num_reference), noise(num_other, 1) if num_other else None
    floor = floor_of(reference, other, count, seed=3)
    assert floor is not None
    assert floor.images is (reference if is_part_of_reference else other)
    assert len(set(floor.items.tolist())) == number
    compared = chosen_items(num_reference, count, 3)[:number]
    assert not is_part_of_reference or not set(compared) & set(floor.items)
    comparison = Comparison(Colors(), Accelerator(), 50, count, seed=3)
    decoded = comparison.features_of(other or reference, np.arange(min(count, 20)), "")
    protocol = Protocol(
        reference="", reference_hash="", num_reference_images=None, num_images=20, seed=3
    )
    results = comparison.compare("rFD", decoded, reference, other, protocol)
    entry = results["rFD-Colors floor"]
    sides = Colors()(floor.images.images_at(floor.items)), Colors()(reference.images_at(compared))
    assert entry["value"] == pytest.approx(frechet_distance(*(side.features for side in sides)))
    assert compared_numbers(entry["protocol"]) == f"{number}"
    assert ("as there are no more" in entry.get("note", "")) == (number < count)


def test_without_a_second_image_there_is_no_floor() -> None:
    assert floor_of(noise(3), None, 3, 0) is None


@pytest.mark.parametrize(("count", "is_enough"), [(27, True), (6, False)])
def test_fewer_images_than_features_are_a_warning_in_log_table_and_results(
    count: int, is_enough: bool, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = Comparison(Colors(), Accelerator(), 50, count, seed=0)
    protocol = Protocol(
        reference="", reference_hash="", num_reference_images=None, num_images=count, seed=0
    )
    features = comparison.features_of(noise(count), np.arange(count), "")
    results = comparison.compare("rFD", features, noise(99, 1), noise(99, 2), protocol)
    warning = f"{count} images are too few for 6 feature dimensions"
    texts = (caplog.text, table({"reconstruction": results}), json.dumps(results))
    assert [warning in text for text in texts] == [not is_enough] * 3
    assert f" N = {count}\n" in texts[1]


# Bounds and errors


def test_the_tightest_exact_bound_is_reported_with_its_posterior(
    pipeline: ImageGenerationPipeline, splits: tuple[DecodedImages, DecodedImages]
) -> None:
    tokenizer = pipeline.tokenizer
    train, validation = (to_float(own.images_at(np.arange(len(own)))) for own in splits)
    bounds = {}
    for codes in ("posterior", "nearest"):
        errors = tokenizer.evidence_lower_bound(train, codes=codes).squared_errors
        variance = errors.double().mean().item() / train[0].numel()
        bounds[codes] = tokenizer.evidence_lower_bound(validation, variance, codes=codes)
    means = {codes: bound.bits_per_dim.mean().item() for codes, bound in bounds.items()}
    config = EvaluationConfig(num_images=20)
    results = evaluate_reconstruction(tokenizer, *splits, None, config, Accelerator())
    entry = results["bound_bits_per_dim"]
    assert entry["protocol"]["num_images"] == len(validation)  # all, whatever the distances have
    # The posterior is sampled with other random numbers.
    assert entry["value"] == pytest.approx(min(means.values()), abs=0.02)
    tightest = min(means, key=lambda codes: means[codes])
    assert ("nearest" in entry["protocol"]["settings"]["approximate_posterior"]) == (
        tightest == "nearest"
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_errors_need_no_extractor_and_distances_are_on_white(channels: int) -> None:
    config = TOKENIZER_PRESETS["tiny"].tokenizer.model_copy(update={"channels": channels})
    tokenizer = Tokenizer(config).eval()
    sets = noise(40, 0, channels), noise(30, 1, channels)
    measure = evaluate_reconstruction
    errors = measure(tokenizer, *sets, None, EvaluationConfig(), Accelerator())
    assert not [name for name in errors if "FD" in name]
    assert errors["RMSE"]["protocol"]["extractor"] == {}
    results = measure(tokenizer, *sets, Colors(), EvaluationConfig(), Accelerator())
    assert errors.items() <= results.items()
    originals = sets[1].images_at(np.arange(30))
    decoded = to_uint8(tokenizer.reconstruct(to_float(originals)))
    if channels in (2, 4):
        decoded, originals = composite_on_white(decoded), composite_on_white(originals)
    distance = frechet_distance(Colors()(decoded).features, Colors()(originals).features)
    assert results["rFD-Colors"]["value"] == pytest.approx(distance)
    assert results["rFD-Colors"]["protocol"]["extractor"]["alpha"] == "composited on white"


def test_a_network_that_a_tokenizer_was_built_on_does_not_judge_it(tmp_path: Path) -> None:
    config = TOKENIZER_PRESETS["tiny"].tokenizer
    backbone = BackboneConfig(name="test_resnet")
    groups = tuple(
        group.model_copy(update={"downsampling": 4 * group.downsampling}) for group in config.groups
    )
    tokenizer = Tokenizer(config.model_copy(update={"backbone": backbone, "groups": groups}))
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    judge = ExtractorConfig(
        kind="timm", model="test_resnet", weights=tmp_path / "w.safetensors", image_size=32
    )
    with pytest.raises(InputError, match="must not be 'test_resnet', the backbone"):
        check_extractor(load_extractor(judge), tokenizer)
    check_extractor(Colors(), tokenizer)


# References


def save_statistics(path: Path, mean: object, covariance: object) -> Path:
    if path.suffix == ".npz":
        np.savez(path, mu=np.asarray(mean), sigma=np.asarray(covariance))
    else:
        torch.save({"mu": mean, "sigma": covariance}, path)  # as torch-fidelity caches them
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_saved_statistics_stand_for_the_images_that_they_are_of(
    suffix: str, tmp_path: Path
) -> None:
    images, reference = noise(30), noise(40, 1)
    features = Colors()(reference.images_at(np.arange(40))).features.double().numpy()
    given = features.mean(0), np.cov(features, rowvar=False)
    statistics = load_statistics(save_statistics(tmp_path / f"s{suffix}", *given))
    common = (Colors(), EvaluationConfig(num_images=40), Accelerator())
    expected = compare_sets(images, reference, *common)
    found = compare_sets(images, statistics, *common)
    assert found.keys() == {"FD-Colors", "IS-Colors", "FD-Colors floor"}
    assert found["FD-Colors"]["value"] == pytest.approx(expected["FD-Colors"]["value"])
    assert found["FD-Colors floor"]["value"] is None
    text = table({"folders": found})
    assert "FD-Colors floor: no floor: statistics hold no images" in text
    assert "N = 30 against statistics" in text
    other = load_statistics(save_statistics(tmp_path / f"t{suffix}", np.zeros(5), np.eye(5)))
    with pytest.raises(InputError, match="are of 5 features, but Colors has 6"):
        compare_sets(images, other, *common)


@pytest.mark.parametrize("name", ["a.npz", "a.pt"])
def test_a_file_without_statistics_is_refused_unexecuted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    for content in (b"", b"no statistics"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.\w+ holds no statistics, arrays mu and sigma"):
            load_statistics(path)
    for mean, covariance in (
        (Malicious(), np.eye(2)),
        (np.array([Malicious()]), np.eye(1)),
        (np.zeros(2), np.eye(3)),
        (np.full(2, np.nan), np.eye(2)),
    ):
        with pytest.raises(InputError, match=r"a\..*: |holds no statistics"):
            load_statistics(save_statistics(path, mean, covariance))
    assert not Path("executed").exists()


def write_images(folder: Path, images: DecodedImages) -> Path:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images.images):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for an extractor that is at hand."""
    monkeypatch.setattr("pipelines.evaluate.load_extractor", lambda config: Colors())


@pytest.mark.usefixtures("inception")
def test_two_folders_are_compared_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = noise(30), noise(41, 1)
    folders = write_images(Path("a"), sets[0]), write_images(Path("b"), sets[1])
    Image.new("RGB", (400, 30)).save("a/contact_sheet.png")
    config = EvaluateConfig(folders=folders, image_size=16, output_dir=Path("out"))
    results = evaluate(config)["folders"]
    features = [Colors()(own.images_at(np.arange(len(own)))).features for own in sets]
    entry = results["FD-Colors"]
    assert entry["value"] == pytest.approx(frechet_distance(*features))
    assert compared_numbers(entry["protocol"]) == "30 against 41"
    assert compared_numbers(results["FD-Colors floor"]["protocol"]) == "20"
    assert str(folders[0]) in entry["protocol"]["settings"]["images"]
    assert json.loads(Path("out/folders.json").read_text())["metrics"] == results


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either RUN or folders"),
        ({"folders": (Path("a"), Path("b"))}, "image_size must be given with folders"),
        ({"run_dir": Path("r"), "image_size": 8}, "image_size must be given with folders"),
        (
            {"folders": (Path("a"), Path("b")), "image_size": 8, "reference": "validation"},
            "reference applies to a run alone",
        ),
        (
            {"run_dir": Path("r"), "extractor": ExtractorConfig(kind="none")},
            "leaves nothing but what = 'reconstruction'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig(**fields)


def test_reconstruction_is_measured_offline_by_errors_alone(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "absent.pth").as_uri())
    output = {"what": "reconstruction", "output_dir": tmp_path / "out"}
    without = EvaluateConfig(run_dir=tiny_run, extractor=ExtractorConfig(kind="none"), **output)
    found = [evaluate(config) for config in (EvaluateConfig(run_dir=tiny_run, **output), without)]
    assert found[0] == found[1]
    assert "RMSE" in found[0]["reconstruction"]
    with pytest.raises(InputError, match="FID needs"):
        evaluate(EvaluateConfig(run_dir=tiny_run))


def test_searched_codes_are_measured_and_named(tiny_run: Path, tmp_path: Path) -> None:
    common = {"what": "reconstruction", "extractor": ExtractorConfig(kind="none")}
    plain, searched = (
        evaluate(EvaluateConfig(run_dir=tiny_run, output_dir=tmp_path, search=search, **common))
        for search in (NO_SEARCH, SearchConfig(candidates=4))
    )
    errors = [results["reconstruction"]["RMSE"] for results in (plain, searched)]
    assert errors[1]["value"] < errors[0]["value"]
    assert errors[1]["protocol"]["settings"]["search.candidates"] == 4
    assert errors[0]["protocol"]["settings"] == {"codes": "hard"}
    with pytest.raises(InputError, match=r"search\.rate_weight must be 0 without costs of codes"):
        evaluate(EvaluateConfig(run_dir=tiny_run, search=SearchConfig(rate_weight=1.0), **common))


@pytest.mark.usefixtures("inception")
def test_another_folder_is_reconstructed_and_compared_with(tiny_run: Path, tmp_path: Path) -> None:
    images = noise(40, 5)
    folder = write_images(tmp_path / "other", images)
    config = EvaluateConfig(
        run_dir=tiny_run, num_images=40, reference=folder, output_dir=tmp_path / "out"
    )
    results = evaluate(config)
    tokenizer = Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")
    originals = images.images_at(np.arange(40))
    errors = tokenizer.reconstruct(to_float(originals)).clamp(-1, 1) - to_float(originals)
    rmse = errors.square().mean().sqrt().item() / 2
    assert results["reconstruction"]["RMSE"]["value"] == pytest.approx(rmse, abs=1e-3)
    for kind, name in (("reconstruction", "rFD-Colors"), ("generation", "FD-Colors")):
        assert str(folder) in results[kind][name]["protocol"]["reference"]
        assert results[kind][f"{name} floor"]["protocol"]["num_images"] == 20


def test_a_run_knows_its_images_from_anywhere_and_where_they_were_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_images(Path("images"), noise(60))
    write_images(Path("others"), noise(60, 1))
    data = DataConfig(dataset="folder", root=Path("images"), image_size=16, validation_share=0.4)
    run = tokenizer_run(tmp_path / "run", tmp_path / "cache", total_steps=1)
    run = run.model_copy(update={"data": data})
    train_tokenizer(run)
    saved = json.loads((tmp_path / "run/tokenizer/config.json").read_text())
    assert saved["data"]["root"] == str(Path("images").absolute())
    assert saved["data"]["cache_dir"] == str(Path("runs/cache").absolute())
    monkeypatch.chdir(tmp_path)
    common = {"extractor": ExtractorConfig(kind="none"), "what": "reconstruction"}
    config = EvaluateConfig(run_dir=Path("run"), **common)
    expected = evaluate(config)["reconstruction"]["RMSE"]["value"]
    shutil.move("here/images", "moved")
    with pytest.raises(InputError, match=r"data\.root: there is no folder .*images"):
        evaluate(config)
    moved = config.model_copy(update={"data_root": Path("moved")})
    assert evaluate(moved)["reconstruction"]["RMSE"]["value"] == expected
    assert not Path("runs").exists()  # the cache is where it was
    prior = prior_run(Path("run"), total_steps=1)
    prior = prior.model_copy(update={"is_class_conditional": False})
    for root, refused in (("here/others", True), ("moved", False)):
        folders = {"data_root": Path(root)}
        for command in (
            lambda: train_tokenizer(run.moved_data(Path(root).absolute(), None)),  # noqa: B023
            lambda: evaluate(config.model_copy(update=folders)),  # noqa: B023
            lambda: train_prior(prior.model_copy(update=folders)),  # noqa: B023
            lambda: write_summary(Path("run"), Path("page/summary.html"), **folders),  # noqa: B023
            lambda: write_explanation(Path("run"), Path("page"), **folders),  # noqa: B023
        ):
            with pytest.raises(InputError, match="other training") if refused else nullcontext():
                command()
    assert {path.name for path in Path("page").glob("*.html")} == {
        "summary.html",
        "explanation.html",
    }
    assert "data_root" not in json.loads(Path("run/prior/config.json").read_text())
