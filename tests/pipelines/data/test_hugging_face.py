"""Hugging Face data sets: rows, classes and captions by the names of their columns."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.condition_config import ConditionSourceConfig
from pipelines.config import DataConfig
from pipelines.data.batches import BatchOrder
from pipelines.data.conditions import load_conditions
from pipelines.data.dataset import ImageDataset
from pipelines.data.encoded_images import EncodedImages
from pipelines.data.sources import load_images
from pipelines.data_config import ReadingConfig
from pipelines.training.loading import loading
from prior import Tokens
from tests.image_files import noise
from tests.text_encoders import LetterEncoder
from tokenizer.storage.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def table(seeds: range, **columns: Any) -> Any:
    rows: dict[str, list[Any]] = {"picture": [], "kind": [], "words": []}
    for seed in seeds:
        Image.fromarray(noise(8, 8, seed=seed)).save(buffer := io.BytesIO(), "PNG")
        rows["picture"].append({"bytes": buffer.getvalue(), "path": None})
        rows["kind"].append(seed % 3 * 5)
        rows["words"].append(f"picture {seed}")
    found = datasets.Dataset.from_dict({**rows, **columns})
    return found.cast_column("picture", datasets.Image())


def opened(tmp_path: Path, split: Any = "train", **fields: Any) -> Any:
    reading = {"image_column": "picture", "label_column": "kind", "caption_column": "words"}
    names = ReadingConfig.model_fields.keys() & fields.keys()
    reading |= {name: fields.pop(name) for name in names}
    defaults = {"root": tmp_path / "set", "cache_dir": tmp_path / "cache", "image_size": 8}
    return load_images(
        DataConfig(
            dataset="datasets",
            reading=ReadingConfig(**reading),
            **{**defaults, "validation_share": 0.3, **fields},
        ),
        split,
    )


def seeds_of(dataset: ImageDataset) -> list[int]:
    """Which pictures they are."""
    images = dataset.images_at(np.arange(len(dataset))).permute(0, 2, 3, 1).numpy()
    known = {noise(8, 8, seed=seed).tobytes(): seed for seed in range(20)}
    return [known[image.tobytes()] for image in images]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_each_row_is_in_one_split_with_its_class_and_caption(form: str, tmp_path: Path) -> None:
    if form == "saved":
        table(range(12)).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        table(range(12)).to_parquet(tmp_path / "set" / "data.parquet")
    splits = [opened(tmp_path, split) for split in ("train", "validation")]
    for dataset in splits:
        assert isinstance(dataset, EncodedImages)
        assert isinstance(dataset, ImageDataset)
        assert dataset.class_names == ("0", "5", "10")
        assert dataset.labels.tolist() == [seed % 3 for seed in seeds_of(dataset)]
        assert dataset.captions() == [f"picture {seed}" for seed in seeds_of(dataset)]
    assert sorted(seeds_of(splits[0]) + seeds_of(splits[1])) == list(range(12))
    assert splits[0].fingerprint != splits[1].fingerprint


def test_splits_of_the_set_are_taken_and_its_content_is_known_in_any_form(tmp_path: Path) -> None:
    kinds = {"kind": ["b", "a"] * 4}
    both = {"train": table(range(8), **kinds), "test": table(range(8, 10), kind=["a", "b"])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "set")
    train, validation = opened(tmp_path), opened(tmp_path, "validation")
    assert seeds_of(train) == list(range(8))
    assert seeds_of(validation) == [8, 9]
    assert (train.class_names, validation.labels.tolist()) == (("a", "b"), [0, 1])
    both["train"].to_parquet(tmp_path / "other" / "x.parquet")
    both["test"].save_to_disk(tmp_path / "held_out")
    other = {"root": tmp_path / "other", "validation_root": tmp_path / "held_out"}
    assert opened(tmp_path, **other).fingerprint == train.fingerprint
    assert seeds_of(opened(tmp_path, "validation", **other)) == [8, 9]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_column": "image"},
            r"data\.reading\.image_column: .* has no column 'image', there are picture, kind, w",
        ),
        ({"label_column": "class"}, r"data\.reading\.label_column: .* there are picture, kind, wo"),
        ({"caption_column": "text"}, r"data\.reading\.caption_column: .* no column 'text', there"),
        ({"image_column": "kind"}, r"data\.reading\.image_column: 'kind' of .* holds no images"),
        ({"label_column": "picture"}, r"data\.reading\.label_column: 'picture' .* must hold class"),
        ({"root": None}, r"data\.root or data\.reading\.hub_name, one of them, must name"),
        ({"root": None, "hub_name": "a/b"}, r"data\.reading\.hub_name: a/b cannot be loaded: "),
    ],
)
def test_a_column_or_set_that_does_not_fit_is_named_in_one_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    table(range(4)).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=message) as raised:
        opened(tmp_path, **fields)
    assert "\n" not in str(raised.value)


def test_a_folder_of_something_else_and_a_damaged_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match=r"holds neither parquet files nor what save_to_disk"):
        opened(tmp_path)
    table(range(4)).save_to_disk(tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(InputError, match=r"^data\.root: .* cannot be loaded: "):
        opened(tmp_path)


def test_a_row_without_an_image_is_named_or_another_of_its_class_takes_its_place(
    tmp_path: Path,
) -> None:
    found = table(range(12)).cast_column("picture", datasets.Image(decode=False))
    broken = found.map(
        lambda row: {"picture": None if row["words"] == "picture 4" else row["picture"]},
        features=found.features,
    )
    broken.save_to_disk(tmp_path / "set")
    table(range(2)).save_to_disk(tmp_path / "held_out")
    held_out = {"validation_root": tmp_path / "held_out"}
    with pytest.raises(InputError, match=r"row 4 of .* is not a readable image: there is none"):
        seeds_of(opened(tmp_path, **held_out))
    kept = opened(tmp_path, skip_unreadable=True, **held_out)
    assert seeds_of(kept) == [*range(4), 7, *range(5, 12)]


def test_captions_of_the_table_condition_a_prior(tmp_path: Path) -> None:
    table(range(12)).save_to_disk(tmp_path / "set")
    splits = [opened(tmp_path, split) for split in ("train", "validation")]
    config = ConditionSourceConfig(kind="text")
    found = load_conditions(config, splits[0].config, *splits, LetterEncoder(), torch.device("cpu"))
    assert [len(found.train), len(found.validation)] == [len(own) for own in splits]
    expected = LetterEncoder()(splits[1].captions()[:1], config.max_tokens)[0][0]
    tokens = found.validation.at(np.array([0]))
    assert isinstance(tokens, Tokens)
    assert torch.equal(tokens.embeddings[tokens.mask].float(), expected.half().float())
    with pytest.raises(InputError, match=r"caption_column must name a column"):
        opened(tmp_path, caption_column=None).captions()


def test_images_are_decoded_by_workers_from_any_step_on(tmp_path: Path) -> None:
    table(range(12)).save_to_disk(tmp_path / "set")
    dataset = opened(tmp_path, num_workers=1)

    class Reader:
        encoded, is_scattered = dataset, False

        def loaded(self, images: torch.Tensor, is_flipped: np.ndarray) -> torch.Tensor:
            return images

        def load(self, items: np.ndarray, is_flipped: np.ndarray) -> None: ...

    order = BatchOrder(len(dataset), 4, seed=0)
    tasks = loading(Reader(), order, range(3, 5), 1, torch.device("cpu"))
    for step, task in enumerate(tasks, 3):
        assert torch.equal(task(), dataset.images_at(order.at(step)[0]))
