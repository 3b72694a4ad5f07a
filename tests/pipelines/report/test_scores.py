"""The page of unusual images, from the command line to the files."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.evaluation.anomaly import SCORES
from pipelines.options import parse_options
from pipelines.report.scores import heat_maps
from pipelines.score import main, score
from pipelines.score_config import ScoreConfig
from tests.html_page import Page
from tests.image_files import noise, save
from tokenizer import InputError


def run(*arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    score(parse_options(ScoreConfig, "pipelines.score", words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise and a flat picture, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        save(root / "some" / f"{number}.png", noise(16 + number, 20, seed=number))
    save(root / "<flat>.png", np.full((16, 16, 3), 200, np.uint8))
    return root


def test_the_page_the_table_and_the_numbers_agree(
    tiny_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["score", str(tiny_run), str(folder), "--output-dir", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["<flat>.png", *(f"some/{n}.png" for n in range(5))]
    assert {*SCORES, "prior_bits_layer_3", "png_bits_per_dim"} < rows[0].keys()
    facts = json.loads((out / "scores.json").read_text())
    assert (facts["num_images"], facts["num_reference"], facts["priors"]) == (6, 32, ["prior"])
    page = Page(out / "score.html")
    for entry in facts["scores"]:
        values = [float(row[entry["name"]]) for row in rows]
        assert entry["mean"] == pytest.approx(np.mean(values), rel=1e-4)
        above = np.mean([value > entry["reference_95"] for value in values])
        assert entry["share_above"] == pytest.approx(above)
        assert f"{entry['mean']:.4g}" in page.text
        assert (out / f"{entry['name']}.png").is_file()
    for row in rows:
        layers = [float(row[f"prior_bits_layer_{number}"]) for number in (1, 2, 3)]
        assert sum(layers) == pytest.approx(float(row["code_bits"]), rel=1e-4)
    joint = {row["file"]: float(row["joint"]) for row in rows}
    listed = [text for text in page.text if text in joint]
    assert listed == sorted(joint, key=lambda name: -joint[name])
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert str(tiny_run.parent) not in page.source + json.dumps(facts)


def test_what_cannot_be_scored_is_one_line(tiny_run: Path, folder: Path, tmp_path: Path) -> None:
    bare, empty = tmp_path / "bare", tmp_path / "empty"
    shutil.copytree(tiny_run / "tokenizer", bare / "tokenizer")
    empty.mkdir()
    broken = save(tmp_path / "broken" / "0.png", noise(8, 8)).parent
    (broken / "0.png").write_bytes(b"no picture")
    for arguments, message in (
        ((bare, folder), "run_dir must hold a prior, or a tokenizer with a prior of its own"),
        ((tiny_run, empty), "folder: .*empty"),
        ((tiny_run, broken), r"folder: .*0\.png is not a readable image"),
        ((tiny_run, tmp_path / "none"), "folder: there is no folder"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            run(*arguments, "--output-dir", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_heat_map_is_light_where_the_bits_are(channels: int) -> None:
    images = torch.full((2, channels, 8, 8), 100, dtype=torch.uint8)
    surprise = torch.zeros(2, 8, 8)
    surprise[0, :4] = 3.0
    maps = heat_maps(images, surprise).int()
    assert maps.shape == (2, 3, 8, 8)
    assert (maps[0, :, :4].sum(0) > maps[0, :, 4:].sum(0) + 200).all()
    assert torch.equal(maps[0, :, 4:], maps[1, :, 4:])
