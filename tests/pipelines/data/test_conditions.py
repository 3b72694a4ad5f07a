"""Rows of condition files follow their images; what does not fit is refused in one line."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipelines.condition_config import ConditionSourceConfig
from pipelines.config import DataConfig
from pipelines.data.conditions import ConditionedSplits, load_conditions
from pipelines.data.sources import load_images
from prior import AttributeConditionConfig, Tokens
from tests.image_files import save
from tests.text_encoders import LetterEncoder
from tokenizer.storage.errors import InputError

CPU = torch.device("cpu")


def write_images(root: Path, values: Sequence[int]) -> list[str]:
    """Gray images of classes 9 and 10, whose order is not that of their names; names by value."""
    names = [f"{9 + value % 2}/{97 * value % 256:03d}.png" for value in values]
    for name, value in zip(names, values, strict=True):
        save(root / name, np.full((8, 8), value, np.uint8))
    return names


def data_of(root: Path, **fields: Any) -> DataConfig:
    cache_dir = root.parent / "cache"
    fields = {"root": root, "image_size": 8, "channels": 1, "cache_dir": cache_dir, **fields}
    return DataConfig(dataset="folder", **fields)


def load(data: DataConfig, kind: Any, encoder: Any = None, **fields: Any) -> ConditionedSplits:
    splits = [load_images(data, split) for split in ("train", "validation")]
    return load_conditions(ConditionSourceConfig(kind=kind, **fields), data, *splits, encoder, CPU)


def values_of(data: DataConfig, split: Any) -> np.ndarray:
    images = load_images(data, split)
    return images.images_at(np.arange(len(images)))[:, 0, 0, 0].numpy()


def assert_follows(
    data: DataConfig, found: ConditionedSplits, value_of: Callable[..., Any]
) -> None:
    """Each image's condition tells its gray value."""
    for split, conditions in (("train", found.train), ("validation", found.validation)):
        values = values_of(data, split)
        assert len(conditions) == len(values) > 0
        order = np.random.default_rng(0).permutation(len(values))
        assert value_of(conditions.at(order)).tolist() == values[order].tolist()


def write_vectors(root: Path, names: list[str], values: list[int], how: str) -> None:
    """Vectors (value, 0.5) in one of the four ways."""
    by_name = how.endswith("names")
    order = list(range(len(names))) if by_name else np.argsort(names).tolist()
    vectors = torch.tensor([[values[row], 0.5] for row in order])
    if how.startswith("npy"):
        np.save(root / "conditions.npy", vectors.numpy())
    else:
        save_file({"embeddings": vectors}, root / "conditions.safetensors")
    if by_name:
        (root / "conditions.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.mark.parametrize("how", ["npy", "npy names", "safetensors", "safetensors names"])
@pytest.mark.parametrize("is_apart", [False, True])
def test_vectors_follow_their_images_into_both_splits(
    how: str, is_apart: bool, tmp_path: Path
) -> None:
    roots, values = [tmp_path / "images"], [list(range(0, 160, 3))]
    fields = {}
    if is_apart:
        roots.append(tmp_path / "others")
        values.append(list(range(161, 200, 3)))
        fields = {"validation_root": roots[1]}
    for root, own in zip(roots, values, strict=True):
        write_vectors(root, write_images(root, own), own, how)
    data = data_of(roots[0], **fields)
    found = load(data, "vectors")
    assert_follows(data, found, lambda rows: rows[:, 0])
    assert found.config.dim == 2
    assert len(set(found.sources.values())) == (2 if is_apart else 1)


def test_an_unreadable_image_that_is_left_out_takes_no_row_of_another(tmp_path: Path) -> None:
    root, values = tmp_path / "images", list(range(0, 80, 2))
    names = write_images(root, values)
    (root / names[3]).write_bytes(b"no image")
    write_vectors(root, names, values, "npy names")
    data = data_of(root, skip_unreadable=True)
    assert_follows(data, load(data, "vectors"), lambda rows: rows[:, 0])
    (root / "conditions.txt").unlink()
    with pytest.raises(InputError, match=r"row for each of the 39 images .*, got 40; conditions"):
        load(data, "vectors")


@pytest.mark.parametrize("has_mask", [False, True])
def test_tokens_follow_their_images_with_their_mask(has_mask: bool, tmp_path: Path) -> None:
    root, values = tmp_path / "images", list(range(0, 160, 4))
    names = write_images(root, values)
    order = np.argsort(names).tolist()
    tokens = torch.tensor(values)[order].view(-1, 1, 1) * torch.ones(40, 3, 2)
    mask = torch.arange(3) < 1 + torch.tensor(values)[order].view(-1, 1) // 4 % 3
    if has_mask:
        tokens = tokens.masked_fill(~mask.unsqueeze(2), torch.nan)
    file = {"embeddings": tokens.to(torch.bfloat16)} | ({"mask": mask} if has_mask else {})
    save_file(file, root / "conditions.safetensors")
    data = data_of(root)
    found = load(data, "vectors")

    def value_of(rows: Tokens) -> Tensor:
        first = rows.embeddings[:, 0, 0]
        numbers = 1 + first.long() // 4 % 3 if has_mask else torch.full((len(first),), 3)
        assert torch.equal(rows.mask.sum(1), numbers)
        is_same = (rows.embeddings == first.view(-1, 1, 1)) | ~rows.mask.unsqueeze(2)
        assert bool(is_same.all())
        return first

    assert_follows(data, found, value_of)
    assert (found.config.dim, found.config.num_tokens) == (2, 3)
    assert bool(found.train.sample().isfinite().all())


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("column", ["text", "caption", "my words"])
def test_captions_follow_their_images_and_are_encoded_once(
    name: str, column: str, tmp_path: Path
) -> None:
    root, values = tmp_path / "images", list(range(0, 160, 4))
    names = write_images(root, values)
    texts = ["x" * (value // 4 % 5 + 1) + chr(40 + value // 2) for value in values]
    rows = [{"file_name": f"./{n}", column: text} for n, text in zip(names, texts, strict=True)]
    write_table(root / name, rows)
    data, encoder = data_of(root), LetterEncoder()
    columns = ("my words",) if column == "my words" else ()
    for _ in range(2):
        found = load(data, "text", encoder, columns=columns)
    assert sorted(encoder.texts) == sorted(set(texts))

    def value_of(rows: Tokens) -> Tensor:
        last = rows.mask.sum(1) - 1
        return 2 * (rows.embeddings[torch.arange(len(last)), last, 0] - 40)

    assert_follows(data, found, value_of)
    assert found.config.num_tokens == 6
    assert found.config.text_encoder.content_hash == encoder.content_hash()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_attributes_follow_their_images_and_empty_cells_stay_open(
    name: str, tmp_path: Path
) -> None:
    root, values = tmp_path / "images", list(range(0, 160, 4))
    names = write_images(root, values)
    rows = [
        {"file_name": n, "text": "", "gray": value, "is dark": "" if value % 8 else value < 80}
        for n, value in zip(names, values, strict=True)
    ]
    write_table(root / name, rows)
    data = data_of(root)
    found = load(data, "attributes")
    assert isinstance(found.config, AttributeConditionConfig)
    gray, is_dark = found.config.attributes
    assert (gray.name, is_dark.name) == ("gray", "is dark")
    assert sorted(map(int, gray.values)) == values

    def value_of(rows: Tensor) -> Tensor:
        value = torch.tensor([int(own) for own in gray.values])[rows[:, :-2].argmax(1)]
        truth = torch.tensor([0, 1]) == (value < 80).long().unsqueeze(1)  # false, true
        assert torch.equal(rows[:, -2:], torch.where(value.view(-1, 1) % 8 > 0, -1, truth).char())
        return value

    assert_follows(data, found, value_of)
    only = load(data, "attributes", columns=("is dark",)).config
    assert [own.name for own in only.attributes] == ["is dark"]


def test_several_values_of_one_attribute_are_all_kept(tmp_path: Path) -> None:
    root = tmp_path / "images"
    names = write_images(root, [0, 10, 20])
    tags = [["b", "a"], [], None]
    rows = [{"file_name": n, "tags": own} for n, own in zip(names, tags, strict=True)]
    write_table(root / "metadata.jsonl", rows)
    data = data_of(root, validation_share=0.3)
    found = load(data, "attributes")
    for split, conditions in (("train", found.train), ("validation", found.validation)):
        expected = {0: [1, 1], 10: [0, 0], 20: [-1, -1]}
        for value, row in zip(
            values_of(data, split), conditions.at(np.arange(len(conditions))), strict=True
        ):
            assert row.tolist() == expected[int(value)]


def npy(root: Path, array: Any) -> None:
    np.save(root / "conditions.npy", array)


def tensors(root: Path, **arrays: Tensor) -> None:
    save_file(arrays, root / "conditions.safetensors")


def table(text: str, name: str = "metadata.csv") -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))  # type: ignore[return-value]


ROWS = "file_name,text,color\n9/000.png,a,red\n10/097.png,b,red\n"
VECTORS = np.zeros((3, 2), np.float32)
WRONG: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "holds no conditions.safetensors or conditions.npy": ("vectors", lambda root: None),
    "holds both conditions.safetensors and": (
        "vectors",
        lambda root: (npy(root, VECTORS), tensors(root, embeddings=torch.zeros(3, 2))),
    ),
    "row for each of the 3 images that are used, .* got 4": (
        "vectors",
        lambda root: npy(root, np.zeros((4, 2))),
    ),
    r"\(N, D\) or \(N, T, D\) in floating point, got torch.int64 \(3, 2\)": (
        "vectors",
        lambda root: npy(root, np.zeros((3, 2), np.int64)),
    ),
    r"floating point, got torch.float64 \(3,\)": ("vectors", lambda root: npy(root, np.zeros(3))),
    "must be finite, got NaN or infinity in row 2": (
        "vectors",
        lambda root: npy(root, np.array([[0, 0], [0, 0], [0, np.nan]])),
    ),
    "is damaged or no .npy": (
        "vectors",
        lambda root: np.save(root / "conditions.npy", np.array([{}] * 3), allow_pickle=True),
    ),
    "conditions.safetensors is damaged": (
        "vectors",
        lambda root: (root / "conditions.safetensors").write_bytes(b"x" * 99),
    ),
    "must hold embeddings, .* got vectors": (
        "vectors",
        lambda root: tensors(root, vectors=torch.zeros(3, 2)),
    ),
    r"boolean mask \(3, 4\), got torch.bool \(3, 2\)": (
        "vectors",
        lambda root: tensors(
            root, embeddings=torch.zeros(3, 4, 2), mask=torch.ones(3, 2, dtype=torch.bool)
        ),
    ),
    "must name 3 images, .* got 2": (
        "vectors",
        lambda root: (npy(root, VECTORS), (root / "conditions.txt").write_text("a\nb\n")),
    ),
    "names 9/000.png twice": (
        "vectors",
        lambda root: (npy(root, VECTORS), (root / "conditions.txt").write_text("9/000.png\n" * 3)),
    ),
    "no line for 3 of 3, the first is": (
        "vectors",
        lambda root: (npy(root, VECTORS), (root / "conditions.txt").write_text("a\nb\nc\n")),
    ),
    "holds no metadata.csv or metadata.jsonl": ("text", lambda root: None),
    "got none for 1 of 3, the first is 9/194.png": ("text", table(ROWS)),
    "line 4, names 9/000.png a second time": ("text", table(ROWS + "9/000.png,c,red\n")),
    "line 4, must have 3 cells": ("text", table(ROWS + "9/194.png,c\n")),
    "line 4, must give a file_name, got ''": ("text", table(ROWS + ",c,red\n")),
    "must have a column file_name": ("text", table("name,text\n")),
    "cannot be read: .*utf-8": ("text", table(ROWS + "9/194.png,\udcff,red\n")),
    "line 1, is not JSON": ("text", table("{", "metadata.jsonl")),
    "line 1, must be a JSON object": ("text", table("[1]", "metadata.jsonl")),
    "must give 9/000.png a text in text, got 1": (
        "text",
        table(
            "".join(
                f'{{"file_name": "{name}", "text": 1}}\n'
                for name in ("9/000.png", "10/097.png", "9/194.png")
            ),
            "metadata.jsonl",
        ),
    ),
    "has both text or caption": (
        "text",
        table(
            "file_name,text,caption\n9/000.png,a,a\n10/097.png,b,b\n9/194.png,c,c\n"
        ),
    ),
    "'color' must have 1 to 4096 values": (
        "attributes",
        table("file_name,color\n9/000.png,\n10/097.png,\n9/194.png,\n"),
    ),
    "has no columns of attributes": (
        "attributes",
        table("file_name,text\n9/000.png,\n10/097.png,\n9/194.png,\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", list(WRONG))
def test_a_file_that_does_not_fit_is_refused_in_one_line(message: str, tmp_path: Path) -> None:
    kind, write = WRONG[message]
    root = tmp_path / "images"
    assert write_images(root, [0, 1, 2]) == ["9/000.png", "10/097.png", "9/194.png"]
    write(root)
    with pytest.raises(InputError, match=message) as caught:
        load(data_of(root, validation_share=0.3), kind)  # captions come before their encoder
    assert "\n" not in str(caught.value)


def test_conditions_of_other_sources_and_files_that_are_not_there_are_refused(
    tmp_path: Path,
) -> None:
    root = tmp_path / "images"
    write_images(root, [0, 1, 2])
    table(ROWS + "9/194.png,c,red\n")(root)
    data = data_of(root, validation_share=0.3)
    with pytest.raises(InputError, match=r"there is no .*other\.npy"):
        load(data, "vectors", file=Path("other.npy"))
    with pytest.raises(InputError, match=r"condition.file must end in \.csv or \.jsonl"):
        load(data, "attributes", file=Path("other.npy"))
    with pytest.raises(InputError, match="has no column 'size', there are file_name, text, color"):
        load(data, "attributes", columns=("size",))
    shapes = DataConfig(
        image_size=8, num_images=2, num_validation_images=2, cache_dir=data.cache_dir
    )
    with pytest.raises(InputError, match=r"class or none where data\.dataset is 'shapes'"):
        load(shapes, "text", LetterEncoder())


def test_the_files_of_conditions_are_not_said_to_be_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "images"
    names = write_images(root, [0, 1, 2])
    write_vectors(root, names, [0, 1, 2], "npy names")
    table(ROWS)(root)
    load_images(data_of(root, validation_share=0.3), "train")
    assert caplog.messages == []
    (root / "notes.csv").touch()
    load_images(data_of(root, validation_share=0.3), "train")
    assert "ignored 1 files" in caplog.text
