"""Images that are decoded each time are held against torchvision on the same images."""

from pathlib import Path

import pytest

from benchmarks.speed import decoding
from benchmarks.speed.decoding import compare, copy_images, opened, ours, theirs
from pipelines.data.files import open_files
from tests.image_files import save_classes


def test_both_sides_read_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BATCH", 4)
    monkeypatch.setattr(decoding, "ROUNDS", 1)
    save_classes(tmp_path / "small", ["a", "b"], 10)
    copy_images(tmp_path / "small", tmp_path / "large", 200)
    config = opened(tmp_path / "large", tmp_path / "cache", num_workers=0)
    images = open_files(config, "train")
    assert 16 <= len(images) < 20
    assert ours(images)() == 16
    assert theirs(tmp_path / "large")() == 20
    found = compare(tmp_path / "large", tmp_path / "cache")
    assert found["ratio"] == pytest.approx(found["ours"] / found["torchvision"])
