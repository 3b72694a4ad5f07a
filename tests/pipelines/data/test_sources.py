"""Laws of loading images: shapes, folders and torchvision sets, each by its name."""

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.data.dataset import ImageDataset, Split
from pipelines.data.folder_listing import FolderListing
from pipelines.data.folder_split import hold_out
from pipelines.data.shapes import CLASS_NAMES, draw_shapes
from pipelines.data.sources import SOURCES, load_images
from pipelines.data.torchvision_sets import NAMED_SETS
from pipelines.images import to_float, to_uint8
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.folder import check_output_dir, load_run, write_run_config
from tests.image_files import empty, flip_bit, noise, save, save_classes, truncate
from tokenizer.storage.errors import InputError


def folder_config(tmp_path: Path, **fields: Any) -> DataConfig:
    fields = {"root": tmp_path / "images", "cache_dir": tmp_path / "cache", **fields}
    return DataConfig(dataset="folder", **{"image_size": 8, **fields})


def load_all(tmp_path: Path, **fields: Any) -> ImageDataset:
    """Every image of the folder: the validation images lie elsewhere."""
    save(tmp_path / "held_out" / "image.png", noise(8, 8, seed=9999))
    config = folder_config(tmp_path, validation_root=tmp_path / "held_out", **fields)
    return load_images(config, "train")


def pixels_of(dataset: ImageDataset) -> np.ndarray:
    """All images, channels last."""
    items = np.arange(len(dataset), dtype=np.int64)
    return dataset.images_at(items).permute(0, 2, 3, 1).numpy()


# Pixels


def test_every_byte_survives_the_way_to_floats_and_back_and_others_are_clipped() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(images)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), images)
    outside = torch.tensor([-1.5, 1.5, -torch.inf, torch.inf]).reshape(1, 1, 2, 2)
    assert to_uint8(outside).flatten().tolist() == [0, 255, 0, 255]


# The table of sources


def test_every_source_of_the_config_has_a_row_and_every_row_a_name() -> None:
    assert tuple(SOURCES) == get_args(DataConfig.model_fields["dataset"].annotation)


@pytest.mark.parametrize(("split", "count"), [("train", 1001), ("validation", 9)])
def test_shapes_are_loaded_as_they_are_drawn_in_the_order_that_is_asked_for(
    tmp_path: Path, split: Any, count: int
) -> None:
    config = DataConfig(num_images=1001, num_validation_images=9, seed=5, cache_dir=tmp_path)
    dataset = load_images(config, split)
    assert isinstance(dataset, ImageDataset)
    assert len(dataset) == count
    assert dataset.class_names == CLASS_NAMES
    assert dataset.labels.tolist() == [item % 8 for item in range(count)]
    order = np.array([count - 1, 3, count - 1])
    images = dataset.images_at(order)
    assert images.is_contiguous()
    drawn = draw_shapes(5, split, order, 32, 3)
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), drawn)
    images.zero_()  # a copy
    np.testing.assert_array_equal(dataset.images_at(order).permute(0, 2, 3, 1), drawn)


# Folders


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["zebra", "ant", "Ünïcødé 名"], count=2)
    save(root / "ant" / "deep" / "er" / "x.png", noise(8, 8, seed=77))
    config = folder_config(tmp_path, validation_root=save_classes(tmp_path / "v", ["zebra"], 1))
    dataset = load_images(config, "train")
    assert dataset.class_names == ("ant", "zebra", "Ünïcødé 名")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(pixels_of(dataset)[2], noise(8, 8, seed=77))
    np.testing.assert_array_equal(pixels_of(dataset)[3], noise(8, 8, seed=0))
    held_out = load_images(config, "validation")
    assert held_out.labels.tolist() == [1]
    assert held_out.class_names == dataset.class_names


def test_class_folders_that_are_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["10", "2", "b", "0", "01"], count=2)
    names = load_images(folder_config(tmp_path), "train").class_names
    assert names == ("0", "01", "2", "10", "b")
    assert load_images(folder_config(tmp_path, folder_rules=1), "train").class_names == tuple(
        sorted(names)  # as text: version 0.1
    )


def test_a_flat_folder_has_no_classes_and_what_is_no_image_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.png", "a.png", "ü.jpeg", ".hidden.png"):
        save(tmp_path / "images" / name, noise(8, 8))
    (tmp_path / "images" / "notes.txt").touch()
    dataset = load_all(tmp_path)
    load_images(folder_config(tmp_path), "validation")  # says nothing again
    assert dataset.class_names == ()
    assert dataset.labels.tolist() == [0, 0, 0]
    ignored = "ignored 1 files that are not PNG, JPEG, WebP, BMP or TIFF"
    assert caplog.text.count(f"{tmp_path / 'images'}: {ignored}") == 1


def test_the_split_is_a_partition_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["a", "b"], count=20)

    def contents(split: Any, **fields: Any) -> list[bytes]:
        dataset = load_images(folder_config(tmp_path, validation_share=0.25, **fields), split)
        assert f"{split} {len(dataset)} of 40 files (validation share 0.25" in dataset.description
        return [image.tobytes() for image in pixels_of(dataset)]

    train, held_out = contents("train"), contents("validation")
    assert len(train) + len(held_out) == len({*train, *held_out}) == 40
    assert 3 < len(held_out) < 20
    assert contents("validation", seed=1) != held_out
    assert contents("validation", cache_dir=tmp_path / "other") == held_out


def held_out(names: list[str], labels: list[int] | None = None, **fields: Any) -> set[str]:
    """Of a folder that need not exist."""
    listing = FolderListing(Path("x"), names, labels or [0] * len(names), ())
    return set(hold_out(listing, DataConfig(dataset="folder", **fields), "validation").names)


def test_a_new_file_changes_nothing_for_the_others() -> None:
    names = [f"{number:03d}.png" for number in range(400)]
    expected = held_out(names)
    assert abs(len(expected) - 40) < 20  # binomial: within 3.3 standard deviations
    for new in ("000a.png", "zzz.png", "200a.png"):
        assert held_out(sorted([*names, new])) - {new} == expected
    assert held_out(names[:200]) == expected & set(names[:200])


@pytest.mark.parametrize("seed", range(5))
def test_each_class_keeps_an_image_for_training_and_one_is_held_out(seed: int) -> None:
    names = ["a/0.png", "b/0.png", "c/0.png", "c/1.png"]
    found = held_out(names, [0, 1, 2, 2], validation_share=0.99, seed=seed)
    assert found in ({"c/0.png"}, {"c/1.png"})
    assert held_out(names, [0, 1, 2, 2], validation_share=1e-9, seed=seed) == found


def test_a_run_of_version_01_goes_on_with_its_split_by_the_same_command(tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(20)]
    found = held_out(names, validation_share=0.25, folder_rules=1)
    assert found == {names[row] for row in (0, 3, 8, 9, 19)}  # what it held out
    preset = TOKENIZER_PRESETS["tiny"]
    data = folder_config(tmp_path)
    given = preset.model_copy(update={"data": data, "run_dir": tmp_path / "run"})
    assert check_output_dir(given) == given  # a new run
    write_run_config(given)
    assert check_output_dir(given) == given
    path = given.output_dir / "config.json"
    fields = json.loads(path.read_text())
    del fields["data"]["folder_rules"]
    path.write_text(json.dumps(fields))
    kept = given.model_copy(update={"data": data.model_copy(update={"folder_rules": 1})})
    assert check_output_dir(given) == kept
    assert load_run(TokenizerRunConfig, path) == kept


@pytest.mark.parametrize("damage", [Path.unlink, empty])
def test_a_class_without_an_image_to_train_on_is_named(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = save_classes(tmp_path / "images", ["a", "b", "c"])
    for path in (root / "b").iterdir():
        damage(path)
    save(root / "b" / "x.gif", noise(8, 8))
    if damage is empty:
        message = f"{root}: the class 'b' has no readable image to train on; repair its files, or"
        with pytest.raises(InputError, match=f"^{message}"):
            load_images(folder_config(tmp_path, skip_unreadable=True), "train")
    else:
        assert load_images(folder_config(tmp_path), "train").class_names == ("a", "c")
        assert f"{root}: nothing in 'b' is used, so that there is no such class" in caplog.text
    assert f"{root}: ignored 1 GIF files, which are not read" in caplog.text


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["train", "val"], "--data.root {r}/train --data.validation-root {r}/val"),
        (["test", "Train"], "--data.root {r}/Train --data.validation-root {r}/test"),
        (["train"], "--data.root {r}/train"),
        (
            ["cat", "dog", "val"],
            "mv {r}/val {r}-val and give --data.root {r} --data.validation-root {r}-val",
        ),
        (["cat", "dog"], ""),
    ],
)
def test_splits_that_are_taken_for_classes_are_doubted_with_the_right_command(
    names: list[str], advice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = save_classes(tmp_path / "images", names)
    load_images(folder_config(tmp_path), "train")
    (warning,) = caplog.messages or [""]
    assert warning.endswith(advice.format(r=root))
    assert bool(warning) == bool(advice)


def test_idle_levels_of_16_bits_are_said_at_each_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 4096, (8, 8), np.uint16)
        values[0, 0] = 4095
        save(tmp_path / "images" / f"{number}.png", values)
    for _ in range(2):
        caplog.clear()
        pixels = pixels_of(load_all(tmp_path))
        assert len(np.unique(pixels)) <= 17
        assert f"use {len(np.unique(pixels))} of 256 levels, values up to 4,095; data.wh" in (
            caplog.text
        )
    caplog.clear()
    assert pixels_of(load_all(tmp_path, white_value=4095)).max() == 255
    assert caplog.text == ""
    load_all(tmp_path, white_value=1000)
    assert "values up to 4,095 of which those above 1,000 are clipped" in caplog.text
    caplog.clear()
    full = np.linspace(0, 2**16 - 1, 2**10).astype(np.uint16).reshape(32, 32)
    save(tmp_path / "images" / "full_range.png", full)
    load_all(tmp_path)
    assert "2 of 3 images of more than 8 bits per channel use 17 of 256 levels" in caplog.text


@pytest.mark.parametrize("link", ["extra", "extra.png"])
def test_links_do_not_lead_training_to_what_validates(tmp_path: Path, link: str) -> None:
    save_classes(tmp_path / "images", ["a"])
    save_classes(tmp_path / "held_out", ["a"])
    source = tmp_path / "held_out" / "a"
    target = source if link == "extra" else next(source.iterdir())
    (tmp_path / "images" / "a" / link).symlink_to(target)
    config = folder_config(tmp_path, follow_links=True, validation_root=tmp_path / "held_out")
    for split in get_args(Split):
        with pytest.raises(InputError, match=rf"^data\.follow_links: .*{link}.* is also below"):
            load_images(config, split)
    (tmp_path / "images" / "a" / link).unlink()
    (tmp_path / "images" / "a" / link).symlink_to(save(tmp_path / "more" / "b.png", noise(8, 8)))
    load_images(config, "train")


T, V = "data.root: ", "data.validation_root: "


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ([], [], T + "there is no folder {t}"),
        (["class/readme.txt"], [], T + "{t} holds no PNG, JPEG, WebP, BMP or TIFF images"),
        (["dog/0.png", "b.png"], [], T + "{t} mixes 1 images with class folders, the first are"),
        (["a.png"], [], "data.validation_share must leave images for training and for validation"),
        (["a/0.png", "b/0.png"], ["b/0.png", "c/0.png"], V + "{v} has the class 'c', which {t} "),
        (["a/0.png"], ["0.png"], V + "{t} has class folders, but {v} has none"),
        (["0.png"], ["a/0.png"], V + "{v} has class folders, but {t} has none"),
        (["0.png"], ["../images/0.png"], "data.validation_root must not be data.root itself"),
        (["a/0.png"], ["../images/val/a/0.png"], V[:-2] + " must lie beside data.root, not one in"),
        (["deep/a/0.png"], ["../images/a/0.png"], V[:-2] + " must lie beside data.root"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_whichever_split_is_asked_for(
    tmp_path: Path, training: list[str], validation: list[str], message: str
) -> None:
    roots = {"t": tmp_path / "images", "v": tmp_path / "validation"}
    for root, names in zip(roots.values(), (training, validation), strict=True):
        for name in names:
            root.mkdir(exist_ok=True)
            save(root / name.replace(".txt", ".png"), noise(8, 8)).rename(root / name)
    within = {
        "../images/0.png": ("images", "images/../images"),
        "../images/val/a/0.png": ("images", "images/val"),
        "../images/a/0.png": ("images/deep", "images"),
    }.get(validation[0] if validation else "")
    if within:
        roots = {key: tmp_path / name for key, name in zip("tv", within, strict=True)}
    v = roots["v"] if validation else None
    config = folder_config(tmp_path, root=roots["t"], validation_root=v)
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=f"^{re.escape(message.format(**roots))}"):
            load_images(config, split)
    assert not config.cache_dir.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"root": Path("/x")}, "data.root must be None where data.dataset is 'shapes', got /x"),
        ({"white_value": 9}, "data.white_value must be None where data.dataset is 'shapes', got 9"),
        (
            {"dataset": "MNIST", "validation_root": Path("/x")},
            "data.validation_root must be None where data.dataset is 'MNIST', got /x",
        ),
        ({"dataset": "folder"}, "data.root must name a folder of images where data.dataset is"),
    ],
)
def test_a_folder_that_has_no_use_or_is_missing_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        load_images(DataConfig(cache_dir=tmp_path / "cache", **fields), "train")
    assert not (tmp_path / "cache").exists()


def test_images_are_decoded_once_and_anew_where_a_file_or_a_setting_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = save_classes(tmp_path / "images", ["."])
    fingerprints = [load_all(tmp_path).fingerprint]
    with monkeypatch.context() as patch:
        patch.delattr("pipelines.data.folder.decode_image")
        assert load_all(tmp_path).fingerprint == fingerprints[0]
    root.rename(tmp_path / "moved")
    assert load_all(tmp_path, root=tmp_path / "moved").fingerprint == fingerprints[0]
    (tmp_path / "moved").rename(root)
    time = (root / "0.png").stat().st_mtime_ns
    save(root / "0.png", noise(8, 8, seed=50))
    os.utime(root / "0.png", ns=(time, time + 1))
    fingerprints.append(load_all(tmp_path).fingerprint)
    (root / "0.png").rename(root / "9.png")
    fingerprints.append(load_all(tmp_path).fingerprint)
    (root / "9.png").unlink()
    for fields in ({}, {"image_size": 4}, {"channels": 1}):
        fingerprints.append(load_all(tmp_path, **fields).fingerprint)
    assert len(set(fingerprints)) == 6


# Unreadable files


def flip_middle(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        *((damage, ".png") for damage in (truncate, flip_middle, dangle)),
        (truncate, ".jpg"),
        (truncate, ".webp"),
    ],
)
def test_an_unreadable_file_is_named_or_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, suffix: str
) -> None:
    root = tmp_path / "images"
    for number in range(3):
        save(root / f"{number}{suffix}", noise(64, 64, seed=number))
    damage(root / f"1{suffix}")
    beginning = re.escape(f"{root / f'1{suffix}'} is not a readable image: ")
    ending = "; set data.skip_unreadable to leave out such files"
    with pytest.raises(InputError, match=rf"^{beginning}[^\n]+{ending}$"):
        load_all(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []

    for _ in range(2):  # decoded, then read from the cache
        caplog.clear()
        dataset = load_all(tmp_path, skip_unreadable=True)
        assert len(dataset) == 2
        assert f"left out 1 files that are unreadable, the first is 1{suffix}: " in caplog.text
    with pytest.raises(InputError, match="skip_unreadable"):
        load_all(tmp_path)


def test_labels_stay_with_their_images_where_files_are_skipped(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["a", "b", "c"], count=70)
    for name in ("a/0.png", "a/69.png", "b/3.png"):
        empty(root / name)
    v = save_classes(tmp_path / "v", ["a"], 1)
    dataset = load_images(folder_config(tmp_path, validation_root=v, skip_unreadable=True), "train")
    assert np.bincount(dataset.labels).tolist() == [68, 69, 70]
    saved = {noise(8, 8, seed=100 * k + n).tobytes(): k for k in range(3) for n in range(70)}
    assert [saved[image.tobytes()] for image in pixels_of(dataset)] == dataset.labels.tolist()


def test_a_lack_of_memory_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> None:
        raise MemoryError

    root = save_classes(tmp_path / "images", ["."])
    monkeypatch.setattr("pipelines.data.folder.decode_image", exhausted)
    with pytest.raises(
        InputError, match=f"out of memory while decoding {root}/0.png: make the image"
    ):
        load_all(tmp_path)


# torchvision


class NamedSetOnDisk:
    """Like a set of torchvision: `train` or `split` chooses the part; SVHN names no classes."""

    def __init__(self, root: Path, download: bool, train: bool = False, split: str = "") -> None:
        assert download
        self.count = 300 if train or split == "train" else 2
        if not split:
            self.classes = ["airplane", "automobile"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Image.Image, np.int64]:
        return Image.new("L", (12, 12), row % 256), np.int64(row % 2)


@pytest.mark.parametrize(
    ("name", "class_names"),
    [("CIFAR10", ("airplane", "automobile")), ("SVHN", tuple("0123456789"))],
)
def test_a_torchvision_set_is_converted_and_its_test_part_is_for_validation(
    name: Any, class_names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, name, NamedSetOnDisk)
    config = DataConfig(dataset=name, root=tmp_path, cache_dir=tmp_path / "cache", image_size=8)
    for split, count in (("train", 300), ("validation", 2)):
        dataset = load_images(config, split)
        assert pixels_of(dataset).shape == (count, 8, 8, 3)
        assert pixels_of(dataset)[:, 4, 4, 2].tolist() == [row % 256 for row in range(count)]
        assert dataset.labels.tolist() == [row % 2 for row in range(count)]
        assert dataset.class_names == class_names
    assert dataset.description.startswith(f"torchvision {name}, test part as validation; shorter")


def need_scipy(**_: Any) -> None:
    raise ModuleNotFoundError("No module named 'scipy'", name="scipy")


@pytest.mark.parametrize(
    ("name", "holder", "attribute", "value", "message"),
    [
        ("CIFAR10", "CIFAR10", "url", "file:///nowhere", "could not be downloaded {where}"),
        ("MNIST", "MNIST", "mirrors", ["file:///nowhere/"], "could not be downloaded {where}"),
        ("SVHN", "", "SVHN", need_scipy, "cannot be read without scipy"),
    ],
)
def test_a_torchvision_set_that_cannot_be_had_is_refused_in_one_line_that_helps(
    name: Any,
    holder: str,
    attribute: str,
    value: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = getattr(torchvision.datasets, holder) if holder else torchvision.datasets
    monkeypatch.setattr(place, attribute, value)
    files = re.escape(str(tmp_path / NAMED_SETS[name].files))
    where = rf"\([^\n]+\); put its files where torchvision looks for them: {files}"
    with pytest.raises(InputError, match=f"^data.dataset: {name} {message.format(where=where)}$"):
        load_images(DataConfig(dataset=name, root=tmp_path, cache_dir=tmp_path / "cache"), "train")
    assert list((tmp_path / "cache").iterdir()) == []
