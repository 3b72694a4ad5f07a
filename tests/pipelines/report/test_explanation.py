"""Laws of the page about what codes mean, and of its numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.config import DataConfig
from pipelines.explain import main
from pipelines.report.explanation import SPACES, write_explanation
from pipelines.train_tokenizer import train_tokenizer
from tests.html_page import Page
from tests.tiny_runs import tokenizer_run
from tokenizer.storage.errors import InputError


def explain(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def read(folder: Path) -> tuple[dict[str, Any], Page]:
    facts = json.loads((folder / "explanation.json").read_text())
    return facts, Page(folder / "explanation.html")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("baseline") / "$_<b>"
    train_tokenizer(tokenizer_run(run_dir, cache_dir, "tiny-baseline"))
    return run_dir


@pytest.fixture(scope="module")
def explanation(tiny_run: Path, baseline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with classes, beside a baseline."""
    folder = tmp_path_factory.mktemp("explanation")
    command = f"python -m pipelines.explain {tiny_run}"
    write_explanation(tiny_run, folder, baseline_dir=baseline, num_images=25, command=command)
    return folder


def test_the_page_holds_every_layer_of_both_runs(explanation: Path) -> None:
    facts, page = read(explanation)
    num_layers = [len(run["layers"]) for run in facts["runs"]]
    assert num_layers == [3, 3]
    for number in range(1, 4):
        assert page.text.count(f"layer {number}") >= 2
        assert page.text.count(f"Layer {number}") == 1
        assert (explanation / f"codes_{number}.png").is_file()
    assert page.labels[:4] == ["layer 1", "layers 1–2", "layers 1–3", "original"]


def test_the_numbers_of_the_page_are_those_of_the_file(explanation: Path) -> None:
    facts, page = read(explanation)
    expected = []
    for run in facts["runs"]:
        for layer in run["layers"]:
            expected += [f"{layer['RMSE']:.4f}", f"{layer['PSNR']:.2f} dB"]
            expected += [f"{layer['perplexity']:.1f}", f"{100 * layer['usage']:.1f} %"]
            expected.append(f"{layer['class_bits']['bits']:.4f}")
        for row in run["robustness"]:
            expected += [f"{row[f'{name}_rmse']:.4f}" for name in ("input", "output", "error")]
            expected += [f"{100 * share:.1f} %" for share in row["kept"]]
            assert row["change"] in page.text
        expected += [f"{100 * run['nearest_of_same_class'][space]:.1f} %" for space in SPACES]
    for layer in facts["runs"][0]["layers"]:
        for entry in layer["codes"]:
            expected += [str(entry["code"]), entry["class"]]
            expected += [f"{100 * entry[name]:.1f} %" for name in ("share", "class_share")]
        assert page.holds(f"The largest change is {100 * layer['largest_change']:.1f} %")
    assert set(expected) <= set(page.text)
    assert page.holds("by 25 validation images")


def test_the_file_agrees_with_itself(explanation: Path) -> None:
    facts, _ = read(explanation)
    for run in facts["runs"]:
        for layer in run["layers"]:
            counts = layer["counts"]
            assert len(counts) == layer["num_codes"]
            assert sum(counts) == 25 * layer["height"] * layer["width"]
            shares = [entry["share"] for entry in layer["codes"]]
            assert shares == sorted(shares, reverse=True)
            assert shares[0] == max(counts) / sum(counts)
            assert 0 <= layer["class_bits"]["plug_in_bits"] <= facts["class_entropy_bits"]
        unchanged = run["robustness"][0]
        assert unchanged["kept"] == [1.0] * 3
        assert unchanged["error_rmse"] == pytest.approx(run["layers"][-1]["RMSE"])


def test_the_page_is_complete_in_itself_and_names_no_folder(
    explanation: Path, tiny_run: Path
) -> None:
    _, page = read(explanation)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    sources = [value or "" for name, value in page.attributes if name == "src"]
    assert len(sources) == len(list(explanation.glob("*.png")))
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert any("$_<b>" in text for text in page.text)
    for text in (page.source, (explanation / "explanation.json").read_text()):
        assert str(tiny_run.parent) not in text


def test_flat_gray_images_and_a_fixed_grid_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No classes, fewer images than are pictured, and stage one alone."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    cache_dir = tmp_path / "cache"
    data = DataConfig(
        dataset="folder",
        root=tmp_path / "images",
        validation_share=0.4,
        image_size=16,
        channels=1,
        cache_dir=cache_dir,
    )
    run = tokenizer_run(tmp_path / "run", cache_dir, "tiny-fsq")
    tokenizer = run.tokenizer.model_copy(update={"channels": 1})
    train_tokenizer(run.model_copy(update={"data": data, "tokenizer": tokenizer}))
    assert explain(monkeypatch, tmp_path / "run") == 0
    facts, page = read(tmp_path / "run" / "explanation")
    assert facts["class_entropy_bits"] is None
    assert "class_bits" not in facts["runs"][0]["layers"][0]
    assert not page.holds("about the class")
    assert page.holds("Layer 1")


@pytest.mark.parametrize("kind", ["run", "baseline", "others", "number"])
def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_written(
    kind: str,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments: list[str | Path] = [tiny_run, "--output-dir", tmp_path / "out"]
    line = "no such file"
    if kind == "run":
        arguments[0] = tmp_path
    elif kind == "number":
        arguments += ["--num-images", "1"]
        line = "num_images"
    else:
        arguments += ["--baseline", tmp_path / "other"]
        line = "holds no Tokenizer"
    if kind == "others":
        run = tokenizer_run(tmp_path / "other", tmp_path / "cache")
        data = run.data.model_copy(update={"seed": 5})
        train_tokenizer(run.model_copy(update={"data": data}))
        line = "baseline must be a run on the same images"
    capsys.readouterr()
    assert explain(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert line in errors
    assert not (tmp_path / "out").exists()


def test_a_single_image_has_no_nearest(tmp_path: Path, cache_dir: Path) -> None:
    run = tokenizer_run(tmp_path, cache_dir)
    data = run.data.model_copy(update={"num_validation_images": 1})
    train_tokenizer(run.model_copy(update={"data": data}))
    with pytest.raises(InputError, match="at least 2 validation images"):
        write_explanation(tmp_path, tmp_path / "out")
