"""Features on disk: kept through a kill, checked, shared by evaluations, removed at the end."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor

from pipelines.command_configs import EvaluateConfig
from pipelines.data.decoded_images import DecodedImages
from pipelines.evaluate import evaluate
from pipelines.evaluation import feature_shares
from pipelines.evaluation.distances import Comparison
from pipelines.evaluation.feature_shares import FeatureStore, StoredFeatures
from pipelines.evaluation.features import FeatureOutput
from pipelines.evaluation.protocol import Protocol, Results
from pipelines.sampling_config import SamplingConfig
from tests.extractors import Colors
from tokenizer.storage.errors import InputError


class Counting(Colors):
    """Counts images, and may be interrupted."""

    num_images = 0
    stops_after: int | None = None

    def _extract(self, images: Tensor) -> FeatureOutput:
        self.num_images += len(images)
        if self.stops_after is not None and self.num_images > self.stops_after:
            raise KeyboardInterrupt
        return super()._extract(images)


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shares, "SHARE_SIZE", 16)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """What an evaluation loads."""
    network = Counting()
    monkeypatch.setattr("pipelines.evaluate.load_extractor", lambda config: network)
    return network


def noise(num_images: int, seed: int) -> DecodedImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (num_images, 8, 8, 3), np.uint8)
    labels = np.zeros(num_images, np.int64)
    return DecodedImages(pixels, labels, (), fingerprint=f"{seed}", description=f"noise {seed}")


def config(run: Path, folder: Path, **options: object) -> EvaluateConfig:
    common = {"what": "generation", "num_images": 40, "batch_size": 8, "output_dir": folder}
    return EvaluateConfig(run_dir=run, **{**common, **options})


def values(results: Results) -> dict[str, float]:
    return {name: entry["value"] for name, entry in results.items()}


def test_an_interrupted_evaluation_goes_on_behind_its_finished_shares(
    tiny_run: Path, tmp_path: Path, extractor: Counting
) -> None:
    whole = evaluate(config(tiny_run, tmp_path / "whole"))["generation"]
    assert not (tmp_path / "whole" / "features").exists()
    extractor.num_images, extractor.stops_after = 0, 36
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(tiny_run, tmp_path / "killed"))
    assert len(list(tmp_path.glob("killed/features/unfinished-*/*/*.safetensors"))) == 2
    assert not list(tmp_path.glob("killed/*.json"))
    extractor.num_images, extractor.stops_after = 0, None
    resumed = evaluate(config(tiny_run, tmp_path / "killed"))["generation"]
    assert resumed == whole
    # Of 40 generated images 32 are there; statistics of the floor's images are in the cache.
    assert extractor.num_images == 8 + 40
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["generation.json"]


def test_kept_features_serve_later_evaluations_of_the_same_images(
    tiny_run: Path, tmp_path: Path, extractor: Counting
) -> None:
    kept = {"keep_features": True, "num_images": 20}
    evaluate(config(tiny_run, tmp_path, **kept))
    extractor.num_images = 0
    sampling = SamplingConfig(temperature=0.7)
    evaluate(config(tiny_run, tmp_path, **kept, sampling=sampling))
    assert extractor.num_images == 20  # generated anew; the reference is there
    folders = {path.parent for path in tmp_path.glob("features/*/*.safetensors")}
    assert len(folders) >= 3  # two generated sets and the reference


def stored(folder: Path, extractor: Counting, seed: int = 0) -> StoredFeatures:
    comparison = Comparison(extractor, Accelerator(), 7, 40, 0, FeatureStore(folder))
    found = comparison.features_of(noise(40, seed), np.arange(40), "")
    assert isinstance(found, StoredFeatures)
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = next(own for own in path.parents[1].glob(f"*/{path.name}") if own != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (change, "does not match its own hash"),
        (swap, "is of another evaluation"),
    ],
)
def test_a_share_that_is_damaged_or_of_others_is_said_and_computed_anew(
    damage: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extractor = Counting()
    stored(tmp_path, extractor, seed=1)
    found = stored(tmp_path, extractor)
    before = found.features[:]
    assert torch.equal(before, extractor(noise(40, 0).images_at(np.arange(40))).features)
    damage(found.features.paths[1])
    extractor.num_images = 0
    with caplog.at_level(logging.INFO):
        again = stored(tmp_path, extractor)
    assert torch.equal(again.features[:], before)
    assert extractor.num_images == 16
    warnings = [own.message for own in caplog.records if own.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert message in warnings[0]
    assert "its 16 images are computed anew" in warnings[0]
    assert "2 of 3 shares are finished" in caplog.text


def test_statistics_of_a_reference_are_computed_once(tmp_path: Path) -> None:
    extractor, images = Counting(), noise(40, 0)

    def distances(reference: DecodedImages, store: FeatureStore) -> dict[str, float]:
        comparison = Comparison(extractor, Accelerator(), 50, 40, 3, store)
        fields = {"reference": "", "reference_hash": "", "num_reference_images": None}
        protocol = Protocol(**fields, num_images=40, seed=3)
        features = comparison.features_of(images, np.arange(40), "")
        extractor.num_images = 0
        return values(comparison.compare("rFD", features, reference, noise(30, 2), protocol))

    cache = FeatureStore(None, tmp_path)
    expected = distances(noise(40, 1), FeatureStore())
    assert distances(noise(40, 1), cache) == expected
    assert extractor.num_images == 40 + 30
    assert distances(noise(40, 1), cache) == expected
    assert extractor.num_images == 0
    assert distances(noise(40, 4), cache) != expected  # other images
    for path in tmp_path.glob("statistics-*/covariance.npy"):
        truncate(path)
    with pytest.raises(InputError, match=r"statistics-.* and start again"):
        distances(noise(40, 1), cache)


def test_features_are_kept_only_where_there_is_a_folder() -> None:
    options = {"folders": (Path("a"), Path("b")), "image_size": 8, "keep_features": True}
    with pytest.raises(ValidationError, match="keep_features needs output_dir"):
        EvaluateConfig(**options)
    EvaluateConfig(**options, output_dir=Path("c"))
