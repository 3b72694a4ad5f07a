"""Laws of the page about a run."""

import base64
import json
import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig
from pipelines.evaluation.protocol import Protocol
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.report import page
from pipelines.report.summary import MOST_CLASSES, write_summary
from prior import Prior, PriorConfig
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

CLASS_NAMES = ("<script>alert(1)<", "\"q'&amp;{{", "猫\u202e")
PICTURES = {
    "reconstructions",
    "progressive",
    "samples",
    "curves_tokenizer",
    "curves_prior",
    "codebook_usage",
}
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text, attributes and pictures of a page; every element has to be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text: list[str] = []
        self.labels: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.pictures: list[bytes] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert value is not None
            if name == "src":
                kind, data = value.split(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(base64.b64decode(data, validate=True))
            else:
                self.attributes.append((name, value))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] == "bdi":
            self.labels.append(data)

    def holds(self, text: str) -> bool:
        return text in "|".join(self.text)


def make_run(
    run_dir: Path, data: DataConfig, num_classes: int, preset: str = "tiny", evaluated: bool = True
) -> Path:
    """What both stages and the evaluation leave, from random weights."""
    tokenizer = Tokenizer(TOKENIZER_PRESETS[preset].tokenizer)
    prior = Prior(
        PriorConfig(
            network=PRIOR_PRESETS[preset].prior,
            code_maps=tokenizer.code_maps(data.image_size, data.image_size),
            num_classes=num_classes,
            tokenizer_hash=tokenizer.content_hash(),
        )
    )
    prior.load_code_vectors(tokenizer.code_vectors())
    layers = [0.5, 0.25, 0.125] if preset == "tiny" else []
    train: dict[str, Any] = {"step": 3, "phase": "train", "loss": 2.0}
    for model, stage, config, validation in (
        (tokenizer, "tokenizer", TOKENIZER_PRESETS[preset], {"PSNR": 9.0}),
        (prior, "prior", PRIOR_PRESETS[preset], {"bits_per_image": 41.6}),
    ):
        model.save_pretrained(run_dir / stage / "model")
        update: dict[str, Any] = {"run_dir": run_dir}
        update |= {"data": data} if isinstance(config, TokenizerRunConfig) else {}
        assert isinstance(config, TokenizerRunConfig | PriorRunConfig)
        (run_dir / stage / "config.json").write_text(
            config.model_copy(update=update).model_dump_json()
        )
        lines = [train | {"dequantization_variance": layers}]
        lines.append({"step": 3, "phase": "validation", **validation})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / stage / "metrics.jsonl").write_text(text)
    if evaluated:
        (run_dir / "evaluation").mkdir()
        for name, metrics in (("reconstruction", {"RMSE": 0.125}), ("generation", {"FID": 17.5})):
            results: dict[str, Any] = protocol("images", 4).attach(dict(metrics))
            results |= protocol("images", 4).attach({"IS": 1.5})
            results |= protocol("other images", 5).attach({"FID floor": 3.25})
            command = f"python -m pipelines.evaluate {run_dir} --what all"
            text = json.dumps({"command": command, "metrics": results})
            (run_dir / "evaluation" / f"{name}.json").write_text(text)
    return run_dir


def protocol(reference: str, count: int) -> Protocol:
    return Protocol(
        reference=reference,
        reference_hash="0123456789abcdef" * 4,
        num_reference_images=count,
        num_images=4,
        seed=0,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summarized")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    for number, own in enumerate(pixels):
        path = folder / "images" / CLASS_NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(own).save(path)
    data = DataConfig(
        dataset="folder",
        root=folder / "images",
        validation_share=0.4,
        image_size=16,
        cache_dir=folder / "cache",
    )
    return make_run(folder / "run <1> & co", data, num_classes=3)


@pytest.fixture(scope="module")
def summary(run_dir: Path) -> Page:
    path = run_dir / "summary" / "summary.html"
    write_summary(run_dir, path, durations={"both <stages>": 3725.0, "evaluation": 61.4})
    return Page(path)


def shapes(tmp_path: Path) -> DataConfig:
    return DataConfig(
        image_size=16, num_images=8, num_validation_images=5, cache_dir=tmp_path / "cache"
    )


def test_the_page_is_complete_in_itself(summary: Page) -> None:
    assert not summary.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://|url\(|@import|\bon\w+=", summary.source.split("</style>")[0])
    names = {name for name, _ in summary.attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "style", "alt", "title"}


def test_the_pictures_lie_beside_the_page_and_in_it(run_dir: Path, summary: Page) -> None:
    files = {path.stem: path.read_bytes() for path in (run_dir / "summary").glob("*.png")}
    assert files.keys() == PICTURES
    assert sorted(files.values()) == sorted(summary.pictures)
    assert not list((run_dir / "summary").glob(".*"))


def test_whatever_comes_from_data_is_escaped(summary: Page) -> None:
    assert set(CLASS_NAMES) <= set(summary.labels)
    assert {("title", name) for name in CLASS_NAMES} <= set(summary.attributes)
    assert "run <1> & co" in summary.text
    assert summary.holds("both <stages> 1 h 2 min, evaluation 1 min 1 s")


def test_there_is_a_row_of_samples_for_each_class(run_dir: Path, summary: Page) -> None:
    with Image.open(run_dir / "summary" / "samples.png") as picture:
        assert picture.height == 4 * (len(CLASS_NAMES) * (16 + 2) + 2)
    assert [label for label in summary.labels if label in CLASS_NAMES] == sorted(CLASS_NAMES)


def test_images_are_decoded_from_one_layer_to_all(run_dir: Path, summary: Page) -> None:
    expected = ["layer 1", "layers 1–2", "layers 1–3", "original"]
    start = summary.labels.index("layer 1")
    assert summary.labels[start : start + 4] == expected
    progressive, reconstructions = (
        np.asarray(Image.open(run_dir / "summary" / f"{name}.png"))
        for name in ("progressive", "reconstructions")
    )
    row = 4 * 18
    assert np.array_equal(progressive[3 * row : 4 * row], reconstructions[:row])
    assert np.array_equal(progressive[2 * row : 3 * row], reconstructions[row : 2 * row])


def test_a_shared_protocol_is_told_once_and_differences_at_their_number(summary: Page) -> None:
    assert summary.text.count("0123456789ab…") == 2  # once for each of the two files
    assert summary.text.count("reference: other images; num reference images: 5") == 2
    assert sum('"RMSE"' in text for text in summary.text) == 1
    for value in ("0.125", "17.5", "3.25"):
        assert value in summary.text


def test_folders_are_not_told(run_dir: Path, summary: Page) -> None:
    assert str(run_dir.parent) not in summary.source
    assert summary.holds("pipelines.evaluate …/")


def test_numbers_of_the_run_are_told(run_dir: Path, summary: Page) -> None:
    for stage, model_class in (("tokenizer", Tokenizer), ("prior", Prior)):
        model = model_class.from_pretrained(run_dir / stage / "model")
        assert f"{sum(own.numel() for own in model.parameters()):,}" in summary.text
    assert summary.text.count("3 of 4") == 2
    assert "72 bits" in summary.text  # 4 + 4 + 16 codes of 3 bits
    assert "42 bits" in summary.text
    assert summary.holds(f"torch threads: {torch.get_num_threads()}")
    assert summary.holds(f"torch {metadata.version('torch')}")


def test_a_baseline_without_classes_and_evaluation_can_be_summarized(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shapes(tmp_path), 0, "tiny-baseline", evaluated=False)
    write_summary(folder, tmp_path / "page.html", title="A <title>")
    found = Page(tmp_path / "page.html")
    assert found.text.count("A <title>") == 2
    assert found.holds("None yet: python -m pipelines.evaluate RUN")
    assert "Samples" in found.text
    assert "no classes" in "".join(found.text)


def test_the_same_run_gives_the_same_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", shapes(tmp_path), 8, evaluated=False)
    pages = []
    for name in ("a", "b"):
        write_summary(folder, tmp_path / name / "summary.html")
        pages.append((tmp_path / name / "summary.html").read_bytes())
    assert pages[0] == pages[1]


def test_many_classes_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_CLASSES >= 10
    monkeypatch.setattr("pipelines.report.summary.MOST_CLASSES", 2)
    folder = make_run(tmp_path / "run", shapes(tmp_path), 8, evaluated=False)
    write_summary(folder, tmp_path / "summary.html")
    found = Page(tmp_path / "summary.html")
    assert found.holds("The first 2 of 8 classes.")
    assert found.labels[-2:] == ["disc", "square"]


def test_a_missing_stage_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer/config\.json: no such file"):
        write_summary(tmp_path / "run", tmp_path / "page" / "summary.html")
    assert not (tmp_path / "page").exists()


@given(st.text(st.characters(), max_size=20))
def test_any_text_survives_escaping_unless_html_cannot_hold_it(text: str) -> None:
    parser = HTMLParser(convert_charrefs=True)
    found: list[str] = []
    parser.handle_data = found.append  # type: ignore[method-assign]
    encoded = page.document("", [page.paragraph(text)]).decode("utf-8")
    parser.feed(encoded)
    parser.close()
    expected = "".join(
        "\ufffd" if (ord(own) < 32 and own not in "\n\t") or 127 <= ord(own) < 160 else own
        for own in text
    )
    expected = re.sub("[\ud800-\udfff]", "\ufffd", expected)
    assert expected in "".join(found)
