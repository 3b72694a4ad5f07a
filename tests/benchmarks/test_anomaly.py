"""The benchmark of unusual images: what is compared, once, and the page of what was found."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import anomaly
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from tests.faults.files import small_pipeline
from tests.image_files import noise, save


class Pixels(FeatureExtractor):
    """Pixels as features."""

    def _extract(self, images: Tensor) -> FeatureOutput:
        flat = images.flatten(1).float()
        return FeatureOutput(flat, flat)


def folder_of(root: Path, count: int, strength: float) -> Path:
    """Pictures of noise on gray."""
    for number in range(count):
        pixels = 128 + strength * (noise(16, 16, seed=number).astype(float) - 128)
        save(root / f"{number}.png", pixels.astype(np.uint8))
    return root


def test_every_trial_is_made_once_and_noise_is_told_from_flat_images(tmp_path: Path) -> None:
    for run in ("cifar10", "flowers"):
        small_pipeline().save_pretrained(tmp_path / run)
    weak, strong = folder_of(tmp_path / "weak", 24, 0.2), folder_of(tmp_path / "strong", 8, 1.0)
    others = dict.fromkeys((anomaly.LEFT_OUT, "flowers", "emoji"), strong)
    roots = dict.fromkeys(("cifar10", "flowers"), (weak, weak))
    arguments = (tmp_path, anomaly.TINY, roots, others, Pixels(nn.Identity(), "pixels", {}))
    rows = anomaly.measure(*arguments)
    assert [row["run"] for row in rows] == ["cifar10"] * 3 + ["flowers"] * 2
    for row in rows[:3]:
        assert row["auroc"].keys() == anomaly.COLUMNS.keys()
        assert row["auroc"]["reconstruction_error"] == row["auroc"]["joint"] == 1.0
    arguments = (*arguments[:-1], None)  # type: ignore[assignment]
    assert anomaly.measure(*arguments) == rows


def test_the_class_that_is_left_out_is_not_trained_on(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in (anomaly.LEFT_OUT, "cat"):
            save(tmp_path / "data" / split / name / "0.png", noise(4, 4))
    for _ in range(2):
        roots = anomaly.without_a_class(tmp_path / "data", tmp_path / "nine")
        assert [[path.name for path in root.iterdir()] for root in roots] == [["cat"], ["cat"]]
    assert torch.equal(
        anomaly.images_of(roots[0], 4, 5), torch.from_numpy(noise(4, 4)).movedim(-1, 0)[None]
    )


def test_the_page_shows_the_table_of_the_committed_results() -> None:
    text = anomaly.PAGE.read_text()
    section = text.partition("<!-- anomaly-cpu -->\n")[2].partition("\n<!-- /anomaly-cpu -->")[0]
    facts = json.loads((anomaly.RESULTS / "anomaly_cpu.json").read_text())
    assert section == anomaly.table(facts)
