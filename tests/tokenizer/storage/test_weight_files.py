"""Weights in several files beside an index."""

import errno
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.tokenizer.tiny import HYBRID
from tokenizer import InputError, Tokenizer
from tokenizer.storage import pretrained, weight_files
from tokenizer.storage.weight_files import INDEX, SINGLE, find_weights, write_weights

MAX_BYTES = 5_000


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer that is saved in several files."""
    monkeypatch.setattr(
        pretrained, "write_weights", lambda *own: write_weights(*own, max_file_bytes=MAX_BYTES)
    )
    return Tokenizer(HYBRID)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_in_several_files_loads_bit_for_bit(model: Tokenizer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert set(names(tmp_path)) == {INDEX, "config.json", *files}
    assert len(files) > 2
    weights = model.state_dict()
    assert index["metadata"]["total_size"] == sum(own.nbytes for own in weights.values())
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            sizes = [weights[own].nbytes for own in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= MAX_BYTES or len(sizes) == 1
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.content_hash() == model.content_hash()
    assert Tokenizer.from_pretrained(tmp_path, torch.bfloat16).has_hash(model.content_hash())


def test_loading_holds_one_file_at_a_time_beside_the_model(
    model: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    read: list[weakref.ref[Tensor]] = []
    load = weight_files.load_safetensors

    def counted(path: Path) -> dict[str, Tensor]:
        assert [own for own in read if own() is not None] == []
        weights = load(path)
        read.extend(weakref.ref(own) for own in weights.values())
        return weights

    monkeypatch.setattr(weight_files, "load_safetensors", counted)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert len(read) == len(model.state_dict())
    assert [own for own in read if own() is not None] == []  # the model has copies
    assert loaded.content_hash() == model.content_hash()


def test_another_saving_removes_the_files_of_the_one_before(
    model: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    first = names(tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    second = names(tmp_path)
    assert len(first) == len(second)
    assert set(first) & set(second) == {INDEX, "config.json"}
    assert Tokenizer.from_pretrained(tmp_path).content_hash() == model.content_hash()
    monkeypatch.undo()
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", SINGLE]


def test_a_saving_that_is_cut_off_leaves_the_one_before(
    model: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    before = model.content_hash()
    with torch.no_grad():
        next(model.parameters()).add_(1)

    def fail(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == INDEX:
            raise OSError(errno.ENOSPC, "no space")
        replace(path, write)

    replace = weight_files.replace_file
    monkeypatch.setattr(weight_files, "replace_file", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).content_hash() == before


def first_file(folder: Path) -> Path:
    return find_weights(folder).paths[0]


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def flip_last_byte(folder: Path) -> None:
    path = first_file(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = first_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def set_file(name: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): name})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: first_file(folder).unlink(), "no such file"),
        (truncate, "is damaged or not a safetensors file"),
        (flip_last_byte, "index.json is damaged: it does not match its own hash"),
        (change_index(set_file("../model.safetensors")), "must name safetensors files beside it"),
        (change_index(set_file(["model.safetensors"])), "must name safetensors files beside it"),
        (change_index(lambda own: own["weight_map"].popitem()), "does not fit the files"),
        (change_index(lambda own: own.pop("weight_map")), "must have a weight_map"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named_on_one_line(
    damage: Callable[[Path], object], message: str, model: Tokenizer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
