"""Vectors, tokens, texts and attributes through all commands: train, generate, evaluate."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import ImageGenerationPipeline
from pipelines.condition_config import ConditionSourceConfig
from pipelines.condition_inputs import ConditionReader
from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig
from pipelines.data.decoded_images import DecodedImages
from pipelines.data.sources import trained_images
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from pipelines.generate import GenerateConfig, generate
from pipelines.playground import Playground
from pipelines.report.summary import write_summary
from pipelines.run.folder import load_run
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from prior import AttributeConditionConfig, PriorConfig
from prior.config import AttributeConfig
from tests.image_files import noise, save
from tests.prior.small_priors import FLAT
from tests.text_encoders import LetterEncoder
from tests.tiny_runs import prior_run, tokenizer_run
from tokenizer.storage.errors import InputError

COLORS = ("red", "green", "blue")


class MeanColors(FeatureExtractor):
    """Mean and deviation of each channel."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "MeanColors", {})

    def _extract(self, images: Tensor) -> FeatureOutput:
        pixels = images.float().flatten(2)
        features = torch.cat([pixels.mean(2), pixels.std(2)], 1)
        return FeatureOutput(features, features / 50)


KINDS: dict[str, Any] = {
    "vectors": {"kind": "vectors", "file": Path("conditions.npy")},
    "tokens": {"kind": "vectors", "file": Path("conditions.safetensors")},
    "text": {"kind": "text"},
    "attributes": {"kind": "attributes", "columns": ("color", "size")},
}
GIVEN: dict[str, Any] = {
    "vectors": torch.tensor([1.0, 0.0, 0.0]),
    "tokens": np.ones((2, 3), np.float32),
    "text": "a red dot",
    "attributes": {"color": "red"},
}
"""For all images."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer and, for each kind, a run beside it whose prior is trained; read only."""
    folder = tmp_path_factory.mktemp("conditioned")
    root = folder / "images"
    names = [f"{number:02}.png" for number in range(80)]
    with (root.parent / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "color", "size"])
        for number, name in enumerate(names):
            color, size = COLORS[number % 3], ("small", "large")[number % 2]
            save(root / name, noise(16, 16, seed=number))
            writer.writerow([name, f"a {color} dot", color, size])
    shutil.move(root.parent / "metadata.csv", root)
    vectors = torch.eye(3)[torch.arange(80) % 3]
    vectors[:, 2] = torch.arange(80)  # so that a row tells its image
    np.save(root / "conditions.npy", vectors.numpy())
    tokens = {"embeddings": vectors.unsqueeze(1).repeat(1, 4, 1)}
    save_file(tokens, root / "conditions.safetensors")
    data = DataConfig(
        dataset="folder", root=root, image_size=16, cache_dir=folder / "cache", validation_share=0.4
    )
    run = tokenizer_run(folder / "tokens", folder / "cache", total_steps=1)
    train_tokenizer(run.model_copy(update={"data": data}))
    for kind in KINDS:
        if kind != "tokens":
            (folder / kind).mkdir()
            (folder / kind / "tokenizer").symlink_to(folder / "tokens" / "tokenizer")
        train_prior(config_of(folder, kind), text_encoder=encoder_of(kind))
    return folder


def encoder_of(kind: str, name: str = "letters") -> LetterEncoder | None:
    return LetterEncoder(name) if kind == "text" else None


def config_of(folder: Path, kind: str, **training: Any) -> PriorRunConfig:
    config = prior_run(folder / kind, **training)
    condition = ConditionSourceConfig(**KINDS[kind])
    return config.model_copy(update={"condition": condition, "guidance_scale": 2.0})


def load(run_dir: Path, kind: str, **options: Any) -> ImageGenerationPipeline:
    folder = run_dir / kind
    return ImageGenerationPipeline.from_pretrained(folder, text_encoder=encoder_of(kind), **options)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_pipeline_takes_one_condition_for_all_or_one_for_each(kind: str, run_dir: Path) -> None:
    pipeline, given = load(run_dir, kind), GIVEN[kind]
    images = {
        scale: pipeline(3, condition=given, guidance_scale=scale, output="tensor", progress=False)
        for scale in (1.0, 4.0)
    }
    each = given.expand(3, -1) if isinstance(given, Tensor) else [given] * 3
    each = np.stack(each) if kind == "tokens" else each
    again = pipeline(3, condition=each, output="tensor", progress=False, batch_size=2)
    assert torch.equal(images[1.0], again)
    assert not torch.equal(images[1.0], images[4.0])
    with pytest.raises(InputError, match="condition must have one row for 4 images, got 3"):
        pipeline(4, condition=each, progress=False)
    with pytest.raises(InputError, match="labels must be None"):
        pipeline(3, 0, progress=False)


def test_attributes_may_be_texts() -> None:
    config = AttributeConditionConfig(
        attributes=(
            AttributeConfig(name="color", values=("red", "green", "none")),
            AttributeConfig(name="rim", values=("blue", "none")),
        )
    )
    reader = ConditionReader(PriorConfig(code_maps=FLAT, condition=config))
    for text, entry in (
        ("red", {"color": "red"}),
        ("blue,green", {"rim": "blue", "color": "green"}),
        ("rim=none,red,color=green", {"rim": "none", "color": ["red", "green"]}),
        ("", {}),
    ):
        assert torch.equal(reader.read(text, 2), reader.read([entry, entry], 2))
        assert torch.equal(reader.read([text] * 2, 2), reader.read(entry, 2))
    with pytest.raises(InputError, match=r"such as color=none or rim=none, got 'none', .* several"):
        reader.read("none", 1)


def test_what_does_not_suit_the_prior_is_refused_in_one_line(run_dir: Path) -> None:
    wrong: list[tuple[str, Any, str]] = [
        ("vectors", "a red dot", "this prior was not trained on texts"),
        ("vectors", torch.zeros(3, 2), r"shape \(3, 3\), got \(3, 2\)"),
        ("vectors", {"color": "red"}, "array of vectors or tokens, got dict"),
        ("tokens", torch.zeros(3, 5, 3), r"shape \(3, 4, 3\), got \(3, 5, 3\)"),
        ("tokens", torch.zeros(3, 4, 2), r"shape \(3, 4, 3\), got \(3, 4, 2\)"),
        ("attributes", {"colour": "red"}, "no attribute is called 'colour', there are color, size"),
        ("attributes", {"color": "pink"}, "color cannot be 'pink', there are blue, green, red"),
        ("attributes", "pink", "name=value,name=value, such as color=blue, got 'pink', a value of"),
        ("attributes", [3] * 3, "dictionary of attributes, or one for each image, got int"),
        ("attributes", ["red"], "must have one row for 3 images, got 1; what is for all of them"),
        ("attributes", {"color": object()}, "a value must be a text or a number"),
    ]
    for kind, given, message in wrong:
        with pytest.raises(InputError, match=message):
            load(run_dir, kind)(3, condition=given, progress=False)
    with pytest.raises(InputError, match="text_encoder must be None"):
        ImageGenerationPipeline.from_pretrained(run_dir / "vectors", text_encoder=LetterEncoder())


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_page_draws_and_redraws_under_a_condition(kind: str, run_dir: Path) -> None:
    """Without one, guidance has nothing to guide to and is off."""
    pipeline, given = load(run_dir, kind), GIVEN[kind]
    playground = Playground(pipeline)
    if kind in ("vectors", "tokens"):
        file = run_dir / "images" / f"conditions.{'npy' if kind == 'vectors' else 'safetensors'}"
        given = playground.condition_of_file(str(file), 3, 2)
        with pytest.raises(InputError, match=r"a row must lie in \[0, 80\), got '80'"):
            playground.condition_of_file(str(file), 80, 2)
    sampling = SamplingConfig(guidance_scale=3.0)
    drawn = playground.sample(2, None, 1, sampling, given)
    assert drawn == pipeline(2, seed=1, condition=given, guidance_scale=3.0, progress=False)
    free = playground.sample(2, None, 1, sampling)
    assert drawn != free == pipeline(2, seed=1, progress=False)
    picture, painted = drawn[0], Image.new("RGBA", (16, 16))
    painted.paste((255, 0, 0, 255), (0, 0, 16, 9))
    redrawn = playground.redraw(picture, painted, 2, None, 1, sampling, given)
    assert redrawn != playground.redraw(picture, painted, 2, None, 1, sampling)
    assert redrawn[0].crop((0, 9, 16, 16)) == picture.crop((0, 9, 16, 16))


def test_another_encoder_or_none_is_refused_at_the_first_text_alone(run_dir: Path) -> None:
    for encoder, message in (
        (None, r"text_encoder must be given: .*from_pretrained\(folder, text_encoder="),
        (LetterEncoder("others"), "must be the one that this prior was trained with"),
    ):
        pipeline = ImageGenerationPipeline.from_pretrained(run_dir / "text", text_encoder=encoder)
        assert len(pipeline(1, progress=False)) == 1
        with pytest.raises(InputError, match=message):
            pipeline(1, condition="a red dot", progress=False)


@pytest.mark.parametrize("kind", ["vectors", "text", "attributes"])
def test_a_run_goes_on_but_not_with_a_changed_file(
    kind: str, run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir / kind, tmp_path / kind)
    root = tmp_path / "images"
    shutil.copytree(run_dir / "images", root)
    config = config_of(tmp_path, kind).model_copy(update={"data_root": root})
    train_prior(config, text_encoder=encoder_of(kind))
    saved = load_run(PriorRunConfig, tmp_path / kind / "prior" / "config.json")
    assert saved.condition == config.condition
    if kind == "text":
        with pytest.raises(InputError, match="trained with other text encoder"):
            train_prior(config, text_encoder=encoder_of(kind, "others"))
    if kind == "vectors":
        np.save(root / "conditions.npy", np.zeros((80, 3), np.float32))
    else:
        path = root / "metadata.csv"
        path.write_text(path.read_text().replace("00.png,a red dot,red", "00.png,a blue dot,blue"))
    with pytest.raises(InputError, match="trained with other training conditions"):
        train_prior(config, text_encoder=encoder_of(kind))


WORDS = {
    "text": (("a red dot", "a blue dot"), [{"text": "a red dot"}, {"text": "a blue dot"}]),
    "attributes": (
        ("color=red,size=small", "color=blue"),
        [{"color": "red", "size": "small"}, {"color": "blue"}],
    ),
    "vectors": (("FILE", "5", "0"), [{"row": 5}, {"row": 0}]),
    "tokens": (("FILE",), [{"row": row} for row in range(3)]),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_generate_takes_conditions_in_turn_and_says_them_as_a_data_set_does(
    kind: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, described = WORDS[kind]
    root = run_dir / "images"
    path = root / "conditions.npy"
    if kind == "tokens":
        path = tmp_path / "some.npy"
        np.save(path, np.eye(3, dtype=np.float32)[:, None].repeat(4, 1))
    words = tuple(str(path) if word == "FILE" else word for word in words)
    if kind == "text":
        encoder = LetterEncoder()
        monkeypatch.setattr("pipelines.condition_inputs.HuggingFaceEncoder", lambda name: encoder)
    options = {"text_encoder": Path("moved")} if kind == "text" else {}
    config = GenerateConfig(
        run_dir=run_dir / kind,
        output_dir=tmp_path / "out",
        num_images=4,
        condition=words,
        **options,
    )
    generate(config)
    generate(config.model_copy(update={"num_images": 5}))
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    expected = [
        {"file_name": f"{number:06}.png", **described[number % len(described)]}
        for number in range(5)
    ]
    assert [json.loads(line) for line in lines] == expected
    pipeline, condition = load(run_dir, kind), [words[0], words[1 % len(words)]]
    if kind == "vectors":
        condition = torch.from_numpy(np.load(path)[[5, 0]])
    elif kind == "tokens":
        condition = torch.from_numpy(np.load(path)[:2])
    elif kind == "attributes":
        condition = described
    drawn = pipeline(2, condition=condition, progress=False)
    for number, image in enumerate(drawn):
        written = Image.open(tmp_path / "out" / f"{number:06}.png")
        assert image.tobytes() == written.tobytes()
    with pytest.raises(InputError, match="images of other settings: "):
        generate(config.model_copy(update={"condition": ()}))
    with pytest.raises(InputError, match=r"labels must be None for a prior without classes"):
        generate(config.model_copy(update={"labels": (1,)}))


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("attributes", ("pink",), "must be name=value,name=value, such as color=blue, got 'pink'"),
        ("attributes", ("color=pink",), "color cannot be 'pink'"),
        ("vectors", ("nothing.npy",), "there is no file nothing.npy"),
        ("vectors", ("FILE", "80"), r"a row must lie in \[0, 80\), got '80'"),
        ("vectors", ("TOKENS",), r"shape \(1, 3\), got \(1, 4, 3\)"),
    ],
)
def test_words_that_do_not_suit_the_prior_are_refused(
    kind: str, words: tuple[str, ...], message: str, run_dir: Path, tmp_path: Path
) -> None:
    names = {"FILE": "conditions.npy", "TOKENS": "conditions.safetensors"}
    words = tuple(str(run_dir / "images" / names[w]) if w in names else w for w in words)
    config = GenerateConfig(
        run_dir=run_dir / kind, output_dir=tmp_path / "out", num_images=1, condition=words
    )
    with pytest.raises(InputError, match=message):
        generate(config)
    assert not (tmp_path / "out").exists()


def test_evaluation_takes_the_conditions_of_the_reference_images(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    draw = ImageGenerationPipeline.draw

    def noting(self: Any, rows: Any, **options: Any) -> Any:
        asked.append(options["condition"])
        return draw(self, rows, **options)

    monkeypatch.setattr(ImageGenerationPipeline, "draw", noting)
    monkeypatch.setattr("pipelines.evaluate.load_extractor", lambda config: MeanColors())
    run = load_run(TokenizerRunConfig, run_dir / "vectors" / "tokenizer" / "config.json")
    splits = trained_images(run, run_dir / "vectors" / "tokenizer", Accelerator())
    for reference, images in zip(("train", "validation"), splits, strict=True):
        asked.clear()
        config = EvaluateConfig.model_validate(
            {
                "run_dir": run_dir / "vectors",
                "what": "generation",
                "num_images": 20,
                "reference": reference,
                "output_dir": tmp_path,
            },
            strict=False,
        )
        results = evaluate(config)
        settings = next(iter(results["generation"].values()))["protocol"]["settings"]
        assert settings["labels"] == "conditions of the reference images"
        assert isinstance(images, DecodedImages)
        numbers = {int(Path(name).stem) for name in images.item_names()}
        drawn = torch.cat(asked)[:, 2].int().tolist()
        assert len(set(drawn)) == 20
        assert set(drawn) <= numbers
    with pytest.raises(InputError, match="labels must be 'as_reference'"):
        evaluate(config.model_copy(update={"labels": "in_turn"}))


def test_the_page_of_a_run_shows_samples_under_conditions(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.report.page.ROW_WIDTH", 0)
    write_summary(run_dir / "text", tmp_path / "summary.html")  # stored tokens need no encoder
    assert (tmp_path / "samples.png").exists()


def test_old_ways_to_say_the_condition_stay() -> None:
    config = prior_run(Path("run"))
    assert config.condition_kind == "class"
    assert config.model_copy(update={"is_class_conditional": False}).condition_kind == "none"
    fields = json.loads(config.model_dump_json(exclude={"condition"}))
    assert PriorRunConfig.model_validate_json(json.dumps(fields)) == config


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("file applies to kind vectors or text or attributes", {"kind": "class", "file": "a"}),
        ("columns applies to kind text or attributes alone", {"kind": "vectors", "columns": ["a"]}),
        ("text_encoder applies to kind text alone, got None", {"text_encoder": "a"}),
        ("columns must name one for kind text, got 2", {"kind": "text", "columns": ["a", "b"]}),
    ],
)  # fmt: skip
def test_options_of_another_kind_are_refused(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=message):
        ConditionSourceConfig.model_validate_json(json.dumps(fields))


def test_a_prior_needs_what_its_kind_of_condition_takes(run_dir: Path) -> None:
    config = config_of(run_dir, "text")
    with pytest.raises(InputError, match="text_encoder must be a folder or a name on the hub"):
        train_prior(config)
    with pytest.raises(InputError, match=r"condition\.kind must be text beside a text_encoder"):
        train_prior(config_of(run_dir, "vectors"), text_encoder=LetterEncoder())
