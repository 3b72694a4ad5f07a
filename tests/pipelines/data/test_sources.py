"""Laws of loading images: folders, torchvision sets, shapes, and the cache of decoded images."""

import hashlib
import json
import logging
import os
import pickle
import re
import resource
import signal
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pipelines.config import DataConfig
from pipelines.data.decoded_images import DecodedImages, ImageBlock, ImageSource, load_or_store
from pipelines.data.shapes import CLASS_NAMES, draw_shapes
from pipelines.data.sources import load_images
from pipelines.images import to_float, to_uint8
from tokenizer.storage.errors import InputError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return pixels.squeeze(-1) if channels == 1 else pixels


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def save_classes(root: Path, names: list[str], count: int = 4) -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            save(root / name / f"{number}.png", noise(8, 8, seed=100 * label + number))
    return root


def folder_config(tmp_path: Path, **fields: Any) -> DataConfig:
    fields = {"root": tmp_path / "images", "cache_dir": tmp_path / "cache", **fields}
    return DataConfig(dataset="folder", **{"image_size": 8, **fields})


def load_all(tmp_path: Path, **fields: Any) -> DecodedImages:
    """Every image of the folder: the validation images lie elsewhere."""
    save(tmp_path / "held_out" / "image.png", noise(8, 8, seed=9999))
    config = folder_config(tmp_path, validation_root=tmp_path / "held_out", **fields)
    return load_images(config, "train")


def load_one(tmp_path: Path, **fields: Any) -> np.ndarray:
    dataset = load_all(tmp_path, **fields)
    assert len(dataset) == 1
    return np.asarray(dataset.images[0]).astype(np.int64)


# Conversion


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(images)
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(to_uint8(floats), images)


def test_floats_outside_the_range_are_clipped() -> None:
    images = torch.tensor([-1.5, 1.5, -torch.inf, torch.inf]).reshape(1, 1, 2, 2)
    assert to_uint8(images).flatten().tolist() == [0, 255, 0, 255]


def test_images_are_gathered_in_the_given_order_with_channels_first(tmp_path: Path) -> None:
    dataset = load_images(DataConfig(num_images=20, cache_dir=tmp_path), "train")
    order = np.array([7, 3, 7, 19])
    images = dataset.images_at(order)
    assert images.is_contiguous()
    assert images.shape == (4, 3, 32, 32)
    for row, item in enumerate(order):
        np.testing.assert_array_equal(images[row].permute(1, 2, 0), dataset.images[item])


# Shapes


def test_shapes_are_loaded_as_they_are_drawn(tmp_path: Path) -> None:
    config = DataConfig(num_images=1001, num_validation_images=9, seed=5, cache_dir=tmp_path)
    for split, count in (("train", 1001), ("validation", 9)):
        dataset = load_images(config, split)
        assert len(dataset) == count
        assert dataset.class_names == CLASS_NAMES
        assert dataset.labels.tolist() == [item % 8 for item in range(count)]
        last = np.array([count - 1])
        expected = draw_shapes(5, split, last, 32, 3)
        np.testing.assert_array_equal(dataset.images[-1:], expected)


def test_the_images_on_disk_are_read_only(tmp_path: Path) -> None:
    dataset = load_images(DataConfig(num_images=2, cache_dir=tmp_path), "train")
    with pytest.raises(ValueError, match="read-only"):
        dataset.images[0] = 0


def test_the_fingerprint_is_that_of_images_labels_and_class_names(tmp_path: Path) -> None:
    dataset = load_images(DataConfig(num_images=3, image_size=4, cache_dir=tmp_path), "train")
    content = draw_shapes(0, "train", np.arange(3), 4, 3).tobytes()
    content += np.arange(3, dtype="<i8").tobytes()
    content += json.dumps([3, 4, 4, 3, *CLASS_NAMES]).encode()
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()


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


# Decoding


def test_an_image_of_the_right_size_is_not_altered(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    for number, suffix in enumerate((".png", ".PNG", ".webp")):
        save(tmp_path / "images" / f"{number}{suffix}", pixels, lossless=True)
    for image in load_all(tmp_path).images:
        np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8), (8, 9)])
def test_the_center_is_cropped(tmp_path: Path, height: int, width: int) -> None:
    pixels = noise(height, width)
    save(tmp_path / "images" / "a.png", pixels)
    top, left = (height - 8) // 2, (width - 8) // 2
    if (height - width) % 2 == 0:
        np.testing.assert_array_equal(
            load_one(tmp_path), pixels[top : top + 8, left : left + 8].astype(np.int64)
        )
    else:  # half a pixel off either way
        neighbors = [pixels[:, shift : shift + 8].astype(np.float64) for shift in (0, 1)]
        mean = (neighbors[0] + neighbors[1]) / 2
        errors = [np.abs(load_one(tmp_path) - other).mean() for other in (mean, *neighbors)]
        assert errors[0] == min(errors)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (60, 30), (4, 8)])
def test_the_result_is_that_of_resizing_the_shorter_side_and_cropping(
    tmp_path: Path, height: int, width: int
) -> None:
    image = Image.fromarray(noise(height, width))
    save(tmp_path / "images" / "a.png", image)
    scale = 8 / min(height, width)
    resized = image.resize((int(scale * width), int(scale * height)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 8) // 2, (resized.height - 8) // 2
    expected = np.asarray(resized.crop((left, top, left + 8, top + 8))).astype(np.int64)
    np.testing.assert_allclose(load_one(tmp_path), expected, atol=1)


def test_a_sixteen_bit_image_keeps_its_range(tmp_path: Path) -> None:
    gray = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    save(tmp_path / "images" / "a.png", Image.fromarray(gray))
    expected = np.rint(gray / 257)
    np.testing.assert_array_equal(load_one(tmp_path, channels=1)[..., 0], expected)
    np.testing.assert_array_equal(load_one(tmp_path), np.stack([expected] * 3, axis=2))


def test_gray_is_luminance_and_gray_files_become_equal_channels(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    save(tmp_path / "images" / "a.png", pixels)
    gray = load_one(tmp_path, channels=1)[..., 0]
    np.testing.assert_allclose(gray, pixels @ [0.299, 0.587, 0.114], atol=0.51)
    save(tmp_path / "images" / "a.png", gray.astype(np.uint8))
    np.testing.assert_array_equal(load_one(tmp_path), np.stack([gray] * 3, axis=2))


def test_alpha_is_composited_on_white_or_kept(tmp_path: Path) -> None:
    pixels = noise(8, 8, channels=4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    save(tmp_path / "images" / "a.png", pixels)
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    np.testing.assert_allclose(load_one(tmp_path), expected, atol=1)
    assert (load_one(tmp_path)[0] == 255).all()
    np.testing.assert_array_equal(load_one(tmp_path, channels=4), pixels)
    np.testing.assert_array_equal(load_one(tmp_path, channels=2)[..., 1], pixels[..., 3])


def test_hidden_colors_under_full_transparency_do_not_bleed_when_resizing(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (255, 0, 0, 255)
    pixels[:, 16:] = (0, 255, 0, 0)
    save(tmp_path / "images" / "a.png", pixels)
    assert load_one(tmp_path, channels=4, image_size=9)[..., 1].max() == 0
    assert load_one(tmp_path, image_size=9)[:, 8].tolist() == [[255, 255, 255]] * 9


def test_opaque_files_get_full_alpha(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(8, 8))
    assert (load_one(tmp_path, channels=4)[..., 3] == 255).all()


def test_palettes_are_looked_up_with_their_transparency(tmp_path: Path) -> None:
    colors = Image.fromarray(np.kron(noise(2, 2), np.ones((4, 4, 1), np.uint8)))
    palette = colors.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    save(tmp_path / "images" / "a.png", palette)
    np.testing.assert_allclose(load_one(tmp_path), np.asarray(colors), atol=1)
    hidden = np.asarray(palette) == 0
    save(tmp_path / "images" / "a.png", palette, transparency=0)
    assert (load_one(tmp_path)[hidden] == 255).all()
    assert (load_one(tmp_path, channels=4)[..., 3] == np.where(hidden, 0, 255)).all()


def test_printing_colors_become_screen_colors(tmp_path: Path) -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    save(tmp_path / "images" / "a.jpg", red, quality=100)
    np.testing.assert_allclose(load_one(tmp_path), np.full((8, 8, 3), [255, 0, 0]), atol=4)


def test_bilevel_images_become_black_and_white(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", Image.fromarray(noise(8, 8, 1) > 127))
    assert set(load_one(tmp_path).ravel().tolist()) == {0, 255}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_images_stand_upright(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = np.rot90(upright)
    save(tmp_path / "images" / f"a{suffix}", turned, exif=exif)
    np.testing.assert_allclose(load_one(tmp_path), upright, atol=4)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(2)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "lossless": True}
    save(tmp_path / "images" / "a.webp", frames[0], **options)
    np.testing.assert_array_equal(load_one(tmp_path), np.asarray(frames[0]))


def test_a_very_long_image_takes_little_memory(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", noise(1, 20_000))
    assert load_one(tmp_path, image_size=64).shape == (64, 64, 3)


# Folders


def test_class_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["zebra", "ant", "Ünïcødé 名"], count=2)
    save(root / "ant" / "deep" / "er" / "x.png", noise(8, 8, seed=77))
    config = folder_config(tmp_path, validation_root=save_classes(tmp_path / "v", ["zebra"], 1))
    dataset = load_images(config, "train")
    assert dataset.class_names == ("ant", "zebra", "Ünïcødé 名")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(dataset.images[2], noise(8, 8, seed=77))
    np.testing.assert_array_equal(dataset.images[3], noise(8, 8, seed=0))
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
        return [image.tobytes() for image in dataset.images]

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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


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
        *((damage, ".png") for damage in (truncate, flip_bits, empty, write_text, dangle)),
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
        assert dataset.num_skipped == 1
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
    assert [saved[image.tobytes()] for image in dataset.images] == dataset.labels.tolist()


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


# The cache


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_classes(tmp_path / "images", ["."])
    first = load_all(tmp_path)
    monkeypatch.delattr("pipelines.data.folder.decode_image")
    second = load_all(tmp_path)
    np.testing.assert_array_equal(first.images, second.images)
    assert second.fingerprint == first.fingerprint
    assert second.description == first.description


def test_another_file_time_size_or_setting_is_decoded_anew(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "images", ["."])
    hashes = [load_all(tmp_path).fingerprint]
    facts = (root / "0.png").stat()
    save(root / "0.png", noise(8, 8, seed=50))
    os.utime(root / "0.png", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    hashes.append(load_all(tmp_path).fingerprint)
    (root / "0.png").rename(root / "9.png")
    hashes.append(load_all(tmp_path).fingerprint)
    (root / "9.png").unlink()
    hashes.append(load_all(tmp_path).fingerprint)
    hashes.append(load_all(tmp_path, image_size=4).fingerprint)
    hashes.append(load_all(tmp_path, channels=1).fingerprint)
    assert len(set(hashes)) == len(hashes)


def test_content_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    save_classes(tmp_path / "images", ["."])
    first = load_all(tmp_path)
    (tmp_path / "images").rename(tmp_path / "moved")
    second = load_all(tmp_path, root=tmp_path / "moved")
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "facts.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
def test_a_damaged_cache_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    config = DataConfig(num_images=20, cache_dir=tmp_path)
    load_images(config, "train")
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    message = rf"^{folder / name} is damaged: .+; delete {folder} and start again$"
    with pytest.raises(InputError, match=message):
        load_images(config, "train")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"^data.cache_dir: .* cannot be written: "):
            load_images(DataConfig(cache_dir=cache_dir), "train")


@pytest.fixture
def limited_file_size() -> Iterator[None]:
    """Writing more than 100,000 bytes fails, much as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("limited_file_size")
def test_no_space_left_is_an_error_of_the_system_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"File too large: '{tmp_path}/shapes-train-"):
        load_images(DataConfig(num_images=40, cache_dir=tmp_path), "train")
    assert list(tmp_path.iterdir()) == []


def source_that_is_overtaken(cache_dir: Path) -> ImageSource:
    """While it produces its images, another process stores the same."""

    def produce(overtaken: bool) -> Any:
        def blocks() -> Iterator[ImageBlock]:
            yield ImageBlock(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]))
            if overtaken:
                load_or_store(cache_dir, source(overtaken=False), (4, 4, 1))

        return ("a", "b"), blocks()

    def source(overtaken: bool) -> ImageSource:
        return ImageSource("made", "made up", {}, lambda: produce(overtaken))

    return source(overtaken=True)


def test_the_first_of_two_writers_wins_and_the_other_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stored = load_or_store(tmp_path, source_that_is_overtaken(tmp_path), (4, 4, 1))
    assert stored.class_names == ("a", "b")
    assert stored.labels.tolist() == [0, 1]
    assert len(list(tmp_path.iterdir())) == 1
    assert "was stored by another process meanwhile" in caplog.text


def test_writers_at_the_same_time_agree_and_leave_one_entry(tmp_path: Path) -> None:
    everybody_is_writing = threading.Barrier(4, timeout=20)

    def blocks() -> Iterator[ImageBlock]:
        everybody_is_writing.wait()
        for number in range(50):
            yield ImageBlock(np.full((20, 8, 8, 3), number, np.uint8), np.zeros(20, np.int64))

    source = ImageSource("made", "made up", {}, lambda: ((), blocks()))
    with ThreadPoolExecutor(4) as pool:
        attempts = [pool.submit(load_or_store, tmp_path, source, (8, 8, 3)) for _ in range(4)]
    for attempt in attempts:
        np.testing.assert_array_equal(attempt.result().images[::20, 0, 0, 0], np.arange(50))
    assert len(list(tmp_path.iterdir())) == 1


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
        np.testing.assert_array_equal(dataset.images, tiny_cifar10["images"][rows])
        assert dataset.labels.tolist() == tiny_cifar10["labels"][rows]
        assert dataset.class_names == tuple(tiny_cifar10["names"])
    assert dataset.description.startswith("torchvision CIFAR10, test part as validation; shorter")
    resized = load_images(config.model_copy(update={"image_size": 8, "channels": 1}), "train")
    assert resized.images.shape == (12, 8, 8, 1)


def test_a_failed_download_says_where_to_put_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    config = DataConfig(dataset="CIFAR10", root=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError) as caught:
        load_images(config, "train")
    message = str(caught.value)
    assert message.startswith("data.dataset: CIFAR10 could not be downloaded (")
    assert message.endswith(
        f"put its files where torchvision looks for them: {tmp_path / 'cifar-10-python.tar.gz'}"
    )
    assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_from_several_mirrors_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{tmp_path.as_uri()}/nowhere/"])
    config = DataConfig(dataset="MNIST", root=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"^data.dataset: MNIST could not be downloaded \([^\n]*$"):
        load_images(config, "train")


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
    assert dataset.images.shape == (300, 8, 8, 3)
    assert dataset.images[:, 4, 4, 2].tolist() == [row % 256 for row in range(300)]
    assert dataset.labels.tolist() == [row % 10 for row in range(300)]
    assert dataset.class_names == tuple("0123456789")


def test_a_missing_package_of_a_torchvision_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need_scipy(**_: Any) -> None:
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "SVHN", need_scipy)
    config = DataConfig(dataset="SVHN", root=tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"^data.dataset: SVHN cannot be read without scipy$"):
        load_images(config, "train")
