"""Laws of loading images: shapes, folders and torchvision sets, each by its name."""

import hashlib
import os
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pipelines.config import DataConfig
from pipelines.data.dataset import ImageDataset
from pipelines.data.shapes import CLASS_NAMES, draw_shapes
from pipelines.data.sources import SOURCES, load_images
from pipelines.data.torchvision_sets import NAMED_SETS
from pipelines.images import to_float, to_uint8
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"root": Path("x")}, "data.root must be None where data.dataset is 'shapes', got x"),
        (
            {"dataset": "MNIST", "validation_root": Path("x")},
            "data.validation_root must be None where data.dataset is 'MNIST', got x",
        ),
        (
            {"dataset": "folder"},
            "data.root must name a folder of images where data.dataset is 'folder', got None",
        ),
    ],
)
def test_a_folder_that_has_no_use_or_is_missing_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        load_images(DataConfig(cache_dir=tmp_path, **fields), "train")
    assert list(tmp_path.iterdir()) == []


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


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "ü.jpeg"):
        save(tmp_path / "images" / name, noise(8, 8))
    dataset = load_all(tmp_path)
    assert dataset.class_names == ()
    assert dataset.labels.tolist() == [0, 0, 0]


def test_files_that_are_no_images_are_counted_and_hidden_ones_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "images"
    save(root / "a.png", noise(8, 8))
    (root / "notes.txt").write_text("x")
    (root / "labels.csv").write_text("x")
    (root / ".hidden.png").write_text("x")
    save(root / ".ipynb_checkpoints" / "a.png", noise(8, 8))
    assert len(load_all(tmp_path)) == 1
    assert f"{root}: ignored 2 files that are not PNG, JPEG or WebP" in caplog.messages


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    save_classes(tmp_path / "elsewhere", ["cat"], count=3)
    root = save_classes(tmp_path / "images", ["dog"], count=2)
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (root / "dog" / "loop").symlink_to(root)
    config = folder_config(
        tmp_path, validation_root=save_classes(tmp_path / "v", ["cat"], 1), follow_links=True
    )
    dataset = load_images(config, "train")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]


def test_the_split_is_a_partition_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["a", "b"], count=20)

    def contents(split: Any, **fields: Any) -> list[bytes]:
        dataset = load_images(folder_config(tmp_path, validation_share=0.25, **fields), split)
        return [image.tobytes() for image in pixels_of(dataset)]

    train, held_out = contents("train"), contents("validation")
    assert len(train) == 30
    assert len(held_out) == 10
    assert len(set(train) | set(held_out)) == 40
    assert contents("validation", seed=1) != held_out
    assert contents("validation", cache_dir=tmp_path / "other") == held_out


def test_the_description_states_split_resize_and_crop(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["a", "b"], count=5)
    dataset = load_images(folder_config(tmp_path, seed=3), "validation")
    assert dataset.description == (
        f"{root}, validation 1 of 10 files (validation share 0.1, seed 3), 2 classes; shorter "
        "side resized to 8 (Pillow bicubic, antialiased), center crop, RGB, alpha composited on "
        "white"
    )


def make_missing(root: Path) -> str:
    return f"data.root: there is no folder {root}"


def make_empty(root: Path) -> str:
    (root / "class").mkdir(parents=True)
    (root / "class" / "readme.txt").write_text("x")
    return f"data.root: {root} holds no PNG, JPEG or WebP images"


def make_mixed(root: Path) -> str:
    save_classes(root, ["dog", "cat"])
    save(root / "b.png", noise(8, 8))
    save(root / "a.png", noise(8, 8))
    return (
        f"data.root: {root} mixes 2 images with class folders, the first are 'a.png' and 'cat'; "
        "put all images into class folders, or none"
    )


def make_single(root: Path) -> str:
    save(root / "a.png", noise(8, 8))
    return (
        "data.validation_share must leave images for training and for validation, "
        f"got 0.1 of 1 images in {root}"
    )


def make_file(root: Path) -> str:
    root.write_text("x")
    return f"data.root: there is no folder {root}"


def make_badly_encoded(root: Path) -> str:
    root.mkdir()
    try:
        (root / "\udcff.png").write_text("x")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    return (
        f"data.root: '{root}/\\udcff.png' is not a UTF-8 name; set data.skip_unreadable to leave "
        "out what is refused"
    )


@pytest.mark.parametrize(
    "make", [make_missing, make_empty, make_mixed, make_single, make_file, make_badly_encoded]
)
def test_an_unusable_folder_is_refused_in_one_line(tmp_path: Path, make: Any) -> None:
    message = make(tmp_path / "images")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_images(folder_config(tmp_path), "train")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["a", "b"])
    (root / "a").chmod(0)
    with pytest.raises(
        InputError, match=f"^data.root: {re.escape(str(root / 'a'))} cannot be read: "
    ):
        load_images(folder_config(tmp_path), "train")
    (root / "a").chmod(0o700)


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        (["a", "b"], ["b", "c"], "data.validation_root: {v} has the class 'c', which {t} lacks"),
        (["a", "b"], ["."], "data.validation_root: {t} has class folders, but {v} has none"),
        (["."], ["a"], "data.validation_root: {v} has class folders, but {t} has none"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_validation_classes_must_be_training_classes(
    tmp_path: Path, training: list[str], validation: list[str], message: str, split: Any
) -> None:
    t = save_classes(tmp_path / "images", training)
    v = save_classes(tmp_path / "validation", validation)
    with pytest.raises(InputError, match=f"^{re.escape(message.format(t=t, v=v))}$"):
        load_images(folder_config(tmp_path, validation_root=v), split)


def test_validation_on_the_training_folder_is_refused(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["a"])
    with pytest.raises(InputError, match=r"^data.validation_root must not be data.root itself"):
        load_images(folder_config(tmp_path, validation_root=root / ".." / "images"), "train")


# Unreadable files


def flip_middle(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def write_text(path: Path) -> None:
    path.write_text("not an image")


def write_other_format(path: Path) -> None:
    Image.fromarray(noise(8, 8)).save(path, format="GIF")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        *((damage, ".png") for damage in (truncate, flip_middle, empty, write_text, dangle)),
        (write_other_format, ".png"),
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


def test_a_folder_without_any_readable_image_is_refused(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["."], count=3)
    for path in root.iterdir():
        empty(path)
    with pytest.raises(InputError, match=rf"^{root}: none of 3 images of this split is readable$"):
        load_all(tmp_path, skip_unreadable=True)
    assert list((tmp_path / "cache").iterdir()) == []


# torchvision


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def tiny_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An archive in CIFAR-10's format with 12 training and 4 test images, put where it belongs."""
    source = tmp_path / "cifar-10-batches-py"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3072), np.uint8)
    labels = [(3 * number) % 10 for number in range(16)]
    parts = {"data_batch_1": slice(0, 7), "data_batch_2": slice(7, 12), "test_batch": slice(12, 16)}
    for name, rows in parts.items():
        entry = {"data": pixels[rows], "labels": labels[rows]}
        (source / name).write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    archive = tmp_path / "root" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=source.name)
    sums = {path.name: md5(path) for path in source.iterdir()}
    cifar10 = torchvision.datasets.CIFAR10
    training = [[name, sums[name]] for name in ("data_batch_1", "data_batch_2")]
    monkeypatch.setattr(cifar10, "train_list", training)
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(cifar10, "tgz_md5", md5(archive))
    monkeypatch.setattr(cifar10, "url", (tmp_path / "nowhere").as_uri())
    images = pixels.reshape(16, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"images": images, "labels": labels, "names": names}


def test_a_torchvision_set_whose_archive_lies_in_place_is_unpacked_and_decoded(
    tmp_path: Path, tiny_cifar10: dict[str, Any]
) -> None:
    config = DataConfig(dataset="CIFAR10", root=tmp_path / "root", cache_dir=tmp_path / "cache")
    for split, rows in (("train", slice(0, 12)), ("validation", slice(12, 16))):
        dataset = load_images(config, split)
        np.testing.assert_array_equal(pixels_of(dataset), tiny_cifar10["images"][rows])
        assert dataset.labels.tolist() == tiny_cifar10["labels"][rows]
        assert dataset.class_names == tuple(tiny_cifar10["names"])
    assert dataset.description.startswith("torchvision CIFAR10, test part as validation; shorter")
    resized = load_images(config.model_copy(update={"image_size": 8, "channels": 1}), "train")
    assert pixels_of(resized).shape == (12, 8, 8, 1)


class DigitsWithoutNames:
    """Like torchvision's SVHN: images of another size, numpy labels, no class names."""

    def __init__(self, root: Path, split: str, download: bool) -> None:
        assert download
        self.count = {"train": 300, "test": 2}[split]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Image.Image, np.int64]:
        return Image.new("L", (12, 12), row % 256), np.int64(row % 10)


def test_sets_with_numpy_labels_and_no_class_names_are_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "SVHN", DigitsWithoutNames)
    config = DataConfig(dataset="SVHN", root=tmp_path, cache_dir=tmp_path / "cache", image_size=8)
    dataset = load_images(config, "train")
    assert pixels_of(dataset).shape == (300, 8, 8, 3)
    assert pixels_of(dataset)[:, 4, 4, 2].tolist() == [row % 256 for row in range(300)]
    assert dataset.labels.tolist() == [row % 10 for row in range(300)]
    assert dataset.class_names == tuple("0123456789")


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
