"""`check_data` says of every file what training then does with it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipelines.check_data import Report, check_data, describe, write_report
from pipelines.check_data import main as check_data_command
from pipelines.command_configs import CheckDataConfig
from pipelines.config import DataConfig
from pipelines.data.sources import load_images
from tests.image_files import flip_bit
from tokenizer.storage.errors import InputError


def save(path: Path, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each kind."""
    root = tmp_path / "images"
    save(root / "ok" / "a.png")
    save(root / "ok" / "b.jpg")
    save(root / "ok" / "palette.png", "P")
    save(root / "好" / "named.png", format="JPEG")
    truncated = save(root / "好" / "truncated.png")
    truncated.write_bytes(truncated.read_bytes()[:200])
    (root / "好" / "zero.jpg").write_bytes(b"")
    (root / "好" / "notes.txt").write_text("x")
    os.mkfifo(root / "ok" / "pipe.png")
    save(tmp_path / "elsewhere" / "c.png")
    (root / "ok" / "out.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    (root / "ok" / ".hidden").write_text("x")
    return root


def check(folder: Path, **options: Any) -> Report:
    return check_data(CheckDataConfig(folder=folder, image_size=8, **options))


def load(folder: Path, **options: Any) -> Any:
    save(folder.parent / "held_out" / "ok" / "a.png")
    config = DataConfig(
        dataset="folder",
        root=folder,
        validation_root=folder.parent / "held_out",
        cache_dir=folder.parent / "cache",
        image_size=8,
        **options,
    )
    return load_images(config, "train")


def test_every_file_is_listed_with_what_becomes_of_it(folder: Path) -> None:
    report = check(folder)
    assert report.num_files == {"used": 2, "converted": 2, "skipped": 2, "refused": 4}
    assert report.class_names == ("ok", "好")
    assert [(own.file, own.treatment) for own in report.problems] == [
        ("ok/.hidden", "skipped"),
        ("ok/out.png", "refused"),
        ("ok/palette.png", "converted"),
        ("ok/pipe.png", "refused"),
        ("好/named.png", "converted"),
        ("好/notes.txt", "skipped"),
        ("好/truncated.png", "refused"),
        ("好/zero.jpg", "refused"),
    ]
    assert all(own.reason for own in report.problems)
    assert report.obstacle.startswith(f"{folder}/ok/out.png is a link that leaves the folder, to ")


def test_training_stops_where_check_data_says_so(folder: Path) -> None:
    obstacle = check(folder).obstacle
    with pytest.raises(InputError) as caught:
        load(folder)
    assert obstacle in str(caught.value)
    (folder / "ok" / "out.png").unlink()
    obstacle = check(folder).obstacle
    assert obstacle == f"{folder}/ok/pipe.png is not a readable image: not a regular file"
    with pytest.raises(InputError) as caught:
        load(folder)
    assert obstacle in str(caught.value)


@pytest.mark.parametrize("follow_links", [False, True])
def test_training_uses_as_many_files_as_check_data_says(
    folder: Path, follow_links: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"skip_unreadable": True, "follow_links": follow_links}
    report, dataset = check(folder, **options), load(folder, **options)
    assert report.obstacle == ""
    assert report.num_files["refused"] == 0
    assert report.num_files["used"] == 2 + follow_links
    assert len(dataset) == report.num_files["used"] + report.num_files["converted"]
    assert "left out 3 files that are unreadable" in caplog.text
    assert dataset.class_names == report.class_names


def test_every_conversion_and_doubt_is_named_and_counted(tmp_path: Path) -> None:
    wide = np.full((20, 20), 4095, np.uint16)
    images = {
        "cat/one.png": Image.new("RGB", (1, 1)),
        "cat/small.jfif": Image.new("RGB", (5, 9)),
        "cat/panorama.bmp": Image.new("RGB", (2000, 40)),
        "cat/as_it_is.tif": Image.new("RGB", (20, 40)),
        "cat/alpha.png": Image.new("LA", (20, 20)),
        "cat/turned.webp": Image.new("RGB", (20, 30)),
        "cat/chroma.tif": Image.new("YCbCr", (20, 30)),
        "val/wide.png": Image.fromarray(wide),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, image in images.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name, **({"exif": exif} if "turned" in name else {}))
    Image.new("RGB", (20, 20)).save(tmp_path / "val" / "broken_profile.png", icc_profile=b"x")
    (tmp_path / "gifs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "gifs" / "a.gif")
    report = check(tmp_path)
    assert report.num_files == {"used": 1, "converted": 8, "skipped": 1, "refused": 0}
    assert report.conversions == {
        "enlarged": 2,
        "cropped by more than half": 1,
        "16 bits per channel, reduced to 8": 1,
        "color profile that cannot be used, colors taken as they are": 1,
        "transparent pixels, composited on white": 1,
        "turned upright by its EXIF orientation": 1,
        "YCbCr, converted to RGB": 1,
    }
    assert check(tmp_path, channels=1).conversions["color, converted to gray"] == 7
    text = describe(report)
    for line in (
        "       2 converted: enlarged",
        "a.gif is a GIF, which is not read",
        "one.png enlarged (1 × 1 pixels)",
        "panorama.bmp cropped by more than half (2 % of 2000 × 40 pixels kept)",
        "note: 1 of 1 images of more than 8 bits per channel use 1 of 256 levels, values up to 4,0",
        "note: nothing in 'gifs' is used",
        "note: 'val' is taken for a class, and trained on; if it is a split, mv ",
    ):
        assert line in text
    white = check(tmp_path, white_value=4095)
    assert "data.white_value, now 4,095" in describe(white)
    for name in ("val/wide.png", "val/broken_profile.png"):
        (tmp_path / name).write_bytes(b"")
    obstacle = check(tmp_path, skip_unreadable=True).obstacle
    assert obstacle.startswith(f"{tmp_path}: the class 'val' has no readable image to train on")


def test_a_folder_without_any_readable_image_is_an_obstacle_and_a_missing_one_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "images").mkdir()
    assert "holds no PNG, JPEG, WebP, BMP or TIFF images" in check(tmp_path / "images").obstacle
    (tmp_path / "images" / "a.png").write_text("x")
    report = check(tmp_path / "images", skip_unreadable=True)
    assert report.obstacle == f"{tmp_path / 'images'}: none of 1 images is readable"
    config = DataConfig(
        dataset="folder",
        root=tmp_path / "images",
        validation_root=save(tmp_path / "held_out" / "a.png").parent,
        skip_unreadable=True,
        cache_dir=tmp_path / "cache",
    )
    with pytest.raises(InputError, match=r"none of 1 images is readable$"):
        load_images(config, "train")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(InputError, match=f"^folder: there is no folder {tmp_path / 'none'}$"):
        check(tmp_path / "none")


def test_the_report_holds_every_problem_and_the_summary_the_first(folder: Path) -> None:
    for number in range(30):
        (folder / "ok" / f"{number:02d}.txt").write_text("x")
    (folder / "ok" / "\udcff.png").write_text("x")
    config = CheckDataConfig(folder=folder, image_size=8, output=folder.parent / "new" / "r.json")
    report = check_data(config)
    write_report(report, config)
    written = json.loads(config.output.read_text())
    assert [tuple(own.values()) for own in written["problems"]] == report.problems
    assert written["num_files"] == report.num_files
    lines = describe(report).splitlines()
    assert lines[:4] == [
        "       2 used",
        "       2 converted",
        "      32 skipped",
        "       5 refused",
    ]
    assert sum("refused  " in line for line in lines) == 5
    assert lines[-1].endswith("and 19 more in the report")
    assert all(line.isprintable() for line in lines)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; its exit status, its output and its errors."""

    def run_with(*arguments: object) -> tuple[object, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["check_data", *map(str, arguments)])
        status: object = 0
        try:
            check_data_command()
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        return status, captured.out, lines

    return run_with


@pytest.mark.parametrize(("options", "status"), [([], 2), (["--skip-unreadable"], 0)])
def test_the_command_ends_with_status_2_where_training_would_stop(
    folder: Path, options: list[str], status: int, run: Any
) -> None:
    output = folder.parent / "report.json"
    found, text, errors = run(folder, "--image-size", "8", "--output", output, *options)
    assert found == status
    assert f"the report is in {output}" in text
    assert len(errors) == (status == 2)
    assert all(line.startswith(f"error: training would stop: {folder}/ok/out") for line in errors)
    assert json.loads(output.read_text())["folder"] == str(folder)


def test_the_command_verifies_a_cache_with_a_folder_or_alone(tmp_path: Path, run: Any) -> None:
    save(tmp_path / "images" / "ok" / "a.png")
    load(tmp_path / "images")
    (entry,) = (tmp_path / "cache").iterdir()
    verify = ("--verify", "--cache-dir", tmp_path / "cache")
    status, text, _ = run(tmp_path / "images", "--output", tmp_path / "report.json", *verify)
    assert (status, text.splitlines()[-1].split()) == (0, ["whole", str(entry)])
    flip_bit(entry / "images.npy", -1)
    status, text, errors = run(*verify)
    assert (status, text.split()) == (2, ["damaged", str(entry)])
    assert errors == [
        f"error: {entry / 'images.npy'} is damaged: it does not match facts.json; "
        f"delete {entry} and start again"
    ]
    assert run()[2] == ["error: folder must be given, unless --verify is"]
