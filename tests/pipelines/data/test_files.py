"""Images of a folder that are decoded each time: as the memory map has them, or augmented."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import DataConfig
from pipelines.data.augmentation import RandomCrop, draw
from pipelines.data.dataset import ImageDataset
from pipelines.data.encoded_images import EncodedImages
from pipelines.data.sources import load_images
from pipelines.data_config import ReadingConfig
from tests.image_files import noise, save, save_classes, truncate
from tokenizer.storage.errors import InputError

READING = ReadingConfig(draft=False)


def config_of(tmp_path: Path, dataset: Any = "files", **fields: Any) -> DataConfig:
    reading = {} if dataset == "folder" else {"reading": READING}
    defaults = {"image_size": 6, "root": tmp_path / "images", "cache_dir": tmp_path / "cache"}
    return DataConfig(dataset=dataset, **{**defaults, **reading, **fields})


def opened(tmp_path: Path, split: Any = "train", **fields: Any) -> EncodedImages:
    dataset = load_images(config_of(tmp_path, **fields), split)
    assert isinstance(dataset, EncodedImages)
    assert isinstance(dataset, ImageDataset)
    return dataset


def all_images(dataset: ImageDataset) -> torch.Tensor:
    return dataset.images_at(np.arange(len(dataset)))


def test_pixels_labels_and_splits_are_those_of_the_memory_map(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["cat", "dog"], 10)
    save(tmp_path / "images" / "cat" / "photo.jpg", noise(40, 30))
    save(tmp_path / "images" / "dog" / "deep.png", noise(9, 12, 4))
    for split in ("train", "validation"):
        files = opened(tmp_path, split)
        decoded = load_images(config_of(tmp_path, "folder"), split)
        assert torch.equal(all_images(files), all_images(decoded))
        np.testing.assert_array_equal(files.labels, decoded.labels)
        assert files.class_names == decoded.class_names == ("cat", "dog")


def test_the_list_of_files_is_kept_until_a_folder_changes(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["a", "b"])
    first = opened(tmp_path)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("names.npy")]
    assert opened(tmp_path).fingerprint == first.fingerprint
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("names.npy")]
    for number in range(20):
        save(root / "b" / f"new{number}.png", noise(8, 8))
    os.utime(root / "b", ns=(1, 1))  # whatever the clock's resolution
    again = opened(tmp_path)
    assert len(again) > len(first)
    assert again.fingerprint != first.fingerprint


def test_the_fingerprint_follows_the_files_wherever_they_lie(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["a", "b"])
    first = opened(tmp_path).fingerprint
    (tmp_path / "images").rename(tmp_path / "moved")
    assert opened(tmp_path, root=tmp_path / "moved").fingerprint == first
    assert opened(tmp_path, root=tmp_path / "moved", image_size=7).fingerprint != first


def test_an_unreadable_file_is_named_or_another_of_its_class_takes_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_classes(tmp_path / "images", ["a", "b"])
    save(tmp_path / "held_out" / "a" / "0.png", noise(8, 8))
    truncate(tmp_path / "images" / "a" / "3.png")
    held_out = {"validation_root": tmp_path / "held_out"}
    dataset = opened(tmp_path, **held_out)
    with pytest.raises(InputError, match=r"a/3\.png is not a readable image: .*skip_unreadable"):
        all_images(dataset)
    dataset = opened(tmp_path, skip_unreadable=True, **held_out)
    with caplog.at_level(logging.WARNING):
        images = all_images(dataset)
        all_images(dataset)
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(images[3], images[0])  # the next of its class, from the start again
    assert caplog.text.count("1 unreadable images left out") == 1
    assert "a/3.png" in caplog.text


def test_a_large_jpeg_is_decoded_at_a_smaller_size_but_never_below_what_is_asked_for(
    tmp_path: Path,
) -> None:
    gradient = np.linspace(0, 255, 128 * 160 * 3).reshape(128, 160, 3).astype(np.uint8)
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.jpg", gradient, quality=95)
    whole, reduced = (
        all_images(opened(tmp_path, image_size=17, reading=ReadingConfig(draft=draft))).int()
        for draft in (False, True)
    )
    difference = (whole - reduced).abs()
    assert 0 < difference.max() < 12  # 1/4 of the size leaves 32 pixels, and 1/8 would leave 16


def test_crops_and_colors_are_functions_of_seed_step_and_item(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["a", "b"])
    reading = ReadingConfig(crop_area=0.2, color_jitter=0.4)
    dataset = opened(tmp_path, reading=reading)
    items = np.array([0, 1, 2])
    images = dataset.training_images(items, 5, 7).images
    assert torch.equal(images, dataset.training_images(items, 5, 7).images)
    assert torch.equal(images[1:2], dataset.training_images(items[1:2], 5, 7).images)
    for other in (dataset.training_images(items, 5, 8), dataset.training_images(items, 6, 7)):
        assert not torch.equal(images, other.images)
    plain = opened(tmp_path)
    assert torch.equal(dataset.images_at(items), plain.images_at(items))
    assert torch.equal(plain.training_images(items, 5, 7).images, plain.images_at(items))


def test_a_crop_lies_in_the_image_and_keeps_the_share_that_it_says() -> None:
    for item in range(200):
        crop = RandomCrop(draw(0, 0, item), 0.1)
        for width, height in ((50, 50), (300, 40), (40, 300)):
            left, top, right, bottom = crop(width, height)
            assert 0 <= left < right <= width + 1e-9
            assert 0 <= top < bottom <= height + 1e-9
            shorter = min(right - left, bottom - top)
            assert shorter >= min(width, height) * crop.least_share * (1 - 1e-9)


def test_how_images_are_read_is_said_only_of_those_that_are_not_decoded_once(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"data\.reading applies to .*, got 'folder'"):
        load_images(config_of(tmp_path, "folder", reading=READING), "train")
