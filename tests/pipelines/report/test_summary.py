"""Laws of the page about a run."""

import base64
import json
import re
import shutil
import sys
import unicodedata
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import DataConfig
from pipelines.evaluation.protocol import Protocol
from pipelines.report.page import TEMPLATES
from pipelines.report.summary import renew_summary, write_summary
from pipelines.summary import main
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from prior import Prior
from tests.html_page import Page
from tests.tiny_runs import prior_run, tokenizer_run
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

CLASS_NAMES = ("<script>alert(1)<", "\"q'&amp;{{", "猫\u202e" + "w" * 90)
DURATIONS = {"both <stages>": 3725.0, "evaluation": 61.4}
IMAGES = {"reconstructions", "progressive", "samples"}
CHARTS = {"curves_tokenizer", "curves_prior", "codebook_usage"}


def protocol(reference: str, count: int) -> Protocol:
    digest = "0123456789abcdef" * 4
    return Protocol(
        reference=reference, reference_hash=digest, num_reference_images=count, num_images=4, seed=0
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over hostile names, with an evaluation."""
    folder = tmp_path_factory.mktemp("summarized")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "images" / CLASS_NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    root, cache_dir = folder / "images", folder / "cache"
    data = DataConfig(
        dataset="folder", root=root, validation_share=0.4, image_size=16, cache_dir=cache_dir
    )
    run_dir = folder / "run <1> & co"
    train_tokenizer(tokenizer_run(run_dir, cache_dir).model_copy(update={"data": data}))
    train_prior(prior_run(run_dir))
    (run_dir / "evaluation").mkdir()
    for name, metrics in (("reconstruction", {"RMSE": 0.125}), ("generation", {"FID": 17.5})):
        results = protocol("images", 4).attach({**metrics, "IS": 1.5})
        results |= protocol("other images", 5).attach(
            {"FID floor": 3.25}, {"FID floor": "a <note>"}
        )
        command = f"python -m pipelines.evaluate {run_dir} --what all"
        text = json.dumps({"command": command, "metrics": results})
        (run_dir / "evaluation" / f"{name}.json").write_text(text)
    return run_dir


@pytest.fixture(scope="module")
def summary(run_dir: Path) -> Page:
    path = run_dir / "summary" / "summary.html"
    write_summary(run_dir, path, durations=DURATIONS)
    return Page(path)


def test_the_page_is_complete_in_itself(run_dir: Path, summary: Page) -> None:
    assert not summary.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", summary.source.split("</style>")[0])
    names = {name for name, _ in summary.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "alt", "title", "src"}
    files = {path.stem: path.read_bytes() for path in (run_dir / "summary").glob("*.png")}
    assert files.keys() == IMAGES | CHARTS
    sources = [value or "" for name, value in summary.attributes if name == "src"]
    encoded = [f"data:image/png;base64,{base64.b64encode(own).decode()}" for own in files.values()]
    assert sorted(sources) == sorted(encoded)


def test_whatever_comes_from_data_is_escaped(summary: Page) -> None:
    assert [label for label in summary.labels if label in CLASS_NAMES] == sorted(CLASS_NAMES)
    assert {("title", name) for name in CLASS_NAMES} <= set(summary.attributes)
    assert "run <1> & co" in summary.text
    assert summary.holds("both <stages> 1 h 2 min, evaluation 1 min 1 s")


def test_images_are_decoded_from_one_layer_to_all(run_dir: Path, summary: Page) -> None:
    start = summary.labels.index("layer 1")
    expected = ["layer 1", "layers 1–2", "layers 1–3", "original"]
    assert summary.labels[start : start + 4] == expected
    progressive, reconstructions, samples = (
        np.asarray(Image.open(run_dir / "summary" / f"{name}.png"))
        for name in ("progressive", "reconstructions", "samples")
    )
    row = 4 * 18
    assert np.array_equal(progressive[3 * row : 4 * row], reconstructions[:row])
    assert np.array_equal(progressive[2 * row : 3 * row], reconstructions[row : 2 * row])
    assert len(samples) == len(CLASS_NAMES) * row + 8


def test_a_shared_protocol_is_shown_once_and_differences_at_their_number(summary: Page) -> None:
    assert summary.text.count("0123456789ab…") == 2  # once for each of the two files
    assert summary.text.count("reference: other images; num reference images: 5") == 2
    assert {"0.125", "17.5", "3.25", "4 against 5"} <= set(summary.text)
    assert summary.text.count("FID floor: a <note>") == 2
    assert summary.holds("FID, 4 images")


def test_numbers_of_the_run_are_shown_but_not_its_folders(run_dir: Path, summary: Page) -> None:
    for stage, model_class in (("tokenizer", Tokenizer), ("prior", Prior)):
        model = model_class.from_pretrained(run_dir / stage / "model")
        assert f"{sum(weight.numel() for weight in model.parameters()):,}" in summary.text
    assert summary.text.count("4 of 4") == 2
    assert "72 bits" in summary.text  # 4 + 4 + 16 codes of 3 bits
    assert summary.holds(f"torch {metadata.version('torch')}")
    assert str(run_dir.parent) not in summary.source
    assert summary.holds("pipelines.evaluate …/")


def test_the_same_run_gives_the_same_page(run_dir: Path, summary: Page, tmp_path: Path) -> None:
    write_summary(run_dir, tmp_path / "summary.html", durations=DURATIONS)
    assert (tmp_path / "summary.html").read_text() == summary.source


@pytest.mark.parametrize("preset", ["tiny-baseline", "tiny-fsq"])
def test_any_quantizer_without_classes_and_evaluation_can_be_summarized(
    preset: str, tmp_path: Path, cache_dir: Path
) -> None:
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, preset))
    train_prior(prior_run(tmp_path).model_copy(update={"is_class_conditional": False}))
    write_summary(tmp_path, tmp_path / "page.html", title="A <title>")
    page = Page(tmp_path / "page.html")
    assert page.text.count("A <title>") == 2
    assert page.holds("None yet: hqvae evaluate RUN")
    assert "Samples" in page.text
    assert page.holds("no classes")


def test_many_classes_are_cut_and_counted(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.report.summary.MOST_CLASSES", 2)
    write_summary(tiny_run, tmp_path / "summary.html")
    page = Page(tmp_path / "summary.html")
    assert page.holds("The first 2 of 8 classes.")
    assert page.labels[-2:] == ["disc", "square"]


def test_a_missing_stage_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer/config\.json: no such file"):
        write_summary(tmp_path / "run", tmp_path / "page" / "summary.html")
    assert not (tmp_path / "page").exists()


TEMPLATE = TEMPLATES.from_string(
    "{% macro bold(text) %}<b>{{ text }}</b>{% endmacro %}<p>{{ text }}</p>{{ bold(text) }}"
)


@given(st.text(st.characters(), max_size=20))
def test_any_text_survives_escaping_unless_html_cannot_hold_it(text: str) -> None:
    parser = HTMLParser(convert_charrefs=True)
    found: list[str] = []
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(TEMPLATE.render(text=text).encode().decode())
    parser.close()
    shown = [
        "\ufffd" if unicodedata.category(one) in {"Cc", "Cs"} and one not in "\n\t" else one
        for one in text
    ]
    assert "".join(found) == 2 * "".join(shown)


def test_a_run_has_a_page_before_its_prior_and_while_that_is_trained(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the command; a line of metrics that is being written does not count yet."""
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["summary", str(run_dir)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    page = Page(run_dir / "summary.html")
    assert page.holds("no prior over its codes yet")
    assert {path.stem for path in run_dir.glob("*.png")} == (IMAGES | CHARTS) - {
        "samples",
        "curves_prior",
    }
    shutil.copytree(tiny_run / "prior", run_dir / "prior")
    weights = run_dir / "prior" / "model" / "model.safetensors"
    weights.rename(run_dir / "weights")  # of a model that is copied, or was half saved
    renew_summary(run_dir)
    assert f"the prior is left out: {weights.parent} has no weights yet" in caplog.messages
    assert Page(run_dir / "summary.html").holds("no prior over its codes yet")
    (run_dir / "weights").rename(weights)
    metrics = run_dir / "prior" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    assert not page.holds("Fine-tuning of the decoder")
    shutil.copytree(tiny_run / "tokenizer", run_dir / "decoder")  # stands for a fine-tuned one
    renew_summary(run_dir)
    page = Page(run_dir / "summary.html")
    assert page.holds("Drawn from the prior")
    assert page.holds("Fine-tuning of the decoder")
    assert (run_dir / "curves_decoder.png").is_file()
    shutil.rmtree(run_dir / "decoder")
    folder = run_dir / "tokenizer" / "model"
    tokenizer = Tokenizer.from_pretrained(folder)  # and train it further, as --extend-to does
    path = tokenizer.bottom_up
    path.load_state_dict({name: 2 * weight for name, weight in path.state_dict().items()})
    tokenizer.save_pretrained(folder)
    renew_summary(run_dir)
    assert (
        "the prior is left out: it was trained over codes of another tokenizer" in caplog.messages
    )
    assert Page(run_dir / "summary.html").holds("no prior over its codes yet")
    (folder / "config.json").unlink()
    renew_summary(run_dir)
    assert caplog.messages[-1].startswith("summary.html is not renewed: ")
