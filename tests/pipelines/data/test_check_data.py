"""`check_data` says of every file what training then does with it."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.check_data import CheckDataConfig, Report, check_data, describe, write_report
from pipelines.config import DataConfig
from pipelines.data.sources import load_images
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


@pytest.mark.parametrize(("follow_links", "num_skipped"), [(False, 3), (True, 3)])
def test_training_uses_as_many_files_as_check_data_says(
    folder: Path, follow_links: bool, num_skipped: int
) -> None:
    options = {"skip_unreadable": True, "follow_links": follow_links}
    report, dataset = check(folder, **options), load(folder, **options)
    assert report.obstacle == ""
    assert report.num_files["refused"] == 0
    assert report.num_files["used"] == 2 + follow_links
    assert len(dataset) == report.num_files["used"] + report.num_files["converted"]
    assert dataset.num_skipped == num_skipped
    assert dataset.class_names == report.class_names


@pytest.mark.parametrize(
    ("names", "obstacle"),
    [
        ([], "holds no PNG, JPEG or WebP images"),
        (["a.png", "b/c.png"], "mixes 1 images with class folders"),
    ],
)
def test_a_folder_that_does_not_fit_as_a_whole_is_an_obstacle(
    tmp_path: Path, names: list[str], obstacle: str
) -> None:
    for name in names:
        save(tmp_path / name)
    assert obstacle in check(tmp_path).obstacle
    with pytest.raises(InputError, match=obstacle):
        load(tmp_path)


def test_a_folder_without_any_readable_image_is_an_obstacle(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("x")
    report = check(tmp_path / "images", skip_unreadable=True)
    assert report.obstacle == f"{tmp_path / 'images'}: none of 1 images is readable"


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("options", "status"), [([], 2), (["--skip-unreadable"], 0)])
def test_the_command_ends_with_status_2_where_training_would_stop(
    folder: Path,
    options: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = folder.parent / "report.json"
    arguments = [str(folder), "--image-size", "8", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", ["check_data", *arguments])
    monkeypatch.delitem(sys.modules, "pipelines.check_data")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("pipelines.check_data", run_name="__main__")
    assert (caught.value.code or 0) == status
    captured = capsys.readouterr()
    assert f"the report is in {output}" in captured.out
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2)
    assert all(line.startswith(f"error: training would stop: {folder}/ok/out") for line in errors)
    assert json.loads(output.read_text())["folder"] == str(folder)
