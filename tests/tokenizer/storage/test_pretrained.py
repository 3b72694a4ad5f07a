"""Checkpoint folders: exact, strict, and never half written."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from tokenizer import InputError, Tokenizer, hq_vae
from tokenizer.builders import deterministic
from tokenizer.config import NetworkConfig
from tokenizer.quantizers import NearestQuantizerConfig
from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.files import load_safetensors, naming, replace_file
from tokenizer.storage.pretrained import PretrainedModule, load_weights, weights_hash

CONFIG = hq_vae((8, 4), (2, 1), 6, 4, networks=NetworkConfig(width=8, max_width=8, num_blocks=1))


class SmallConfig(StrictConfig):
    """Parameters of the smallest module."""

    width: PositiveInt


class Small(PretrainedModule[SmallConfig]):
    """The smallest module, with a buffer and a scalar."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.randn(config.width, 3))
        self.register_buffer("count", torch.tensor(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Small(SmallConfig(width=2)).save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    edit(weights)
    safetensors.torch.save_file(weights, path)


@pytest.mark.parametrize("config", [CONFIG, deterministic(CONFIG)], ids=["stochastic", "nearest"])
def test_a_loaded_tokenizer_is_the_saved_one_to_the_last_bit(
    config: object, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(config)  # type: ignore[arg-type]
    images = 2 * torch.rand(4, 3, 8, 16) - 1
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(0))
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    loaded = Tokenizer.from_pretrained(str(tmp_path / "a" / "b"))
    assert loaded.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert loaded.content_hash() == tokenizer.content_hash()
    assert torch.equal(loaded.reconstruct(images), tokenizer.eval().reconstruct(images))
    assert not any(module.training for module in loaded.modules())


def test_a_checkpoint_is_two_files_and_saving_again_replaces_them(folder: Path) -> None:
    other = Small(SmallConfig(width=5))
    other.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert Small.from_pretrained(folder).content_hash() == other.content_hash()


def test_a_transposed_weight_is_saved_as_it_reads(tmp_path: Path) -> None:
    module = Small(SmallConfig(width=3))
    module.weight = nn.Parameter(torch.arange(9.0).view(3, 3).T)
    module.save_pretrained(tmp_path)
    loaded = Small.from_pretrained(tmp_path)
    assert torch.equal(loaded.weight, module.weight)
    assert loaded.content_hash() == module.content_hash()


def test_the_content_hash_is_over_names_types_shapes_and_values_alone() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    others = [
        {"c": weights["a"], "b": weights["b"]},
        {"a": weights["a"].double(), "b": weights["b"]},
        {"a": weights["a"].view(2, 3), "b": weights["b"]},
        {"a": weights["a"] + 1e-6, "b": weights["b"]},
    ]
    assert len({weights_hash(own) for own in [weights, *others]}) == 5
    assert weights_hash(dict(reversed(weights.items()))) == weights_hash(weights)
    hashes = set()
    for decay in (0.9, 0.99):  # which leaves the weights alone
        torch.manual_seed(0)
        config = deterministic(CONFIG, NearestQuantizerConfig(decay=decay))
        hashes.add(Tokenizer(config).content_hash())
    assert len(hashes) == 1


# Formats, and parts from outside the config.


class Renamed(PretrainedModule[SmallConfig]):
    """Format 1 had a field more, and called `matrix` "weight"."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig, scale: nn.Module | None = None) -> None:
        super().__init__(config)
        self.matrix = nn.Parameter(torch.randn(config.width, 3))
        self.scale = scale

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        if version < 2:
            fields.pop("rate", None)
        return fields

    @classmethod
    def upgrade_weights(cls, weights: dict[str, Any], version: int) -> dict[str, Any]:
        return {"matrix" if name == "weight" else name: own for name, own in weights.items()}


@pytest.fixture
def first_format(tmp_path: Path) -> Path:
    config = {"model": "Renamed", "width": 2, "rate": 1e-05}
    (tmp_path / "config.json").write_text(json.dumps(config, indent=2))
    safetensors.torch.save_file({"weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_module_of_an_earlier_format_has_both_hashes_as_long_as_it_keeps_its_weights(
    first_format: Path,
) -> None:
    module = Renamed.from_pretrained(first_format)
    assert torch.equal(module.matrix, torch.ones(2, 3))
    # As version 0.1 hashed it, with pydantic's 1e-5.
    text = b'Renamed{"width":2,"rate":0.00001}' + b"weight torch.float32 (2, 3)"
    old = hashlib.sha256(text + torch.ones(2, 3).numpy().tobytes()).hexdigest()
    assert module.has_hash(old)
    assert module.has_hash(module.content_hash())
    assert not module.has_hash("")
    module.save_pretrained(first_format)  # others know the folder by its old hash
    assert Renamed.from_pretrained(first_format).has_hash(old)
    with torch.no_grad():
        module.matrix[0, 0] = 2
    assert not module.has_hash(old)
    module.save_pretrained(first_format)
    fields = json.loads((first_format / "config.json").read_text())
    assert fields == {"model": "Renamed", "format": 2, "width": 2}
    assert Renamed.from_pretrained(first_format).content_hash() == module.content_hash()


def test_the_size_of_weights_under_earlier_names_is_checked_as_well(first_format: Path) -> None:
    edit_weights(first_format, lambda weights: weights.update(weight=torch.zeros(3, 2)))
    with pytest.raises(InputError, match=r"'matrix' must have shape \(2, 3\), got \(3, 2\)"):
        Renamed.from_pretrained(first_format)


def test_what_a_field_was_before_it_went_cannot_stop_a_checkpoint(first_format: Path) -> None:
    path = first_format / "config.json"
    path.write_text(path.read_text().replace("1e-05", r'"\ud800"'))
    assert Renamed.from_pretrained(first_format).config.width == 2


def test_parts_that_no_config_describes_are_passed_on(tmp_path: Path) -> None:
    scale = nn.Linear(2, 2)
    Renamed(SmallConfig(width=2), scale).save_pretrained(tmp_path)
    other = nn.Linear(2, 2)
    assert Renamed.from_pretrained(tmp_path, scale=other).scale is other
    assert torch.equal(other.weight, scale.weight)
    with pytest.raises(InputError, match="has unknown 2 weights"):
        Renamed.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", [3, 10**30, 0, True, 2.0, "2", None])
def test_an_unknown_format_is_refused(folder: Path, number: object) -> None:
    fields = {"model": "Small", "format": number, "width": 2}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=f"format must be .*, got {number!r}"):
        Small.from_pretrained(folder)


# Checkpoints that do not fit.


def test_a_folder_without_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"holds no Small: there is no config\.json"):
            Small.from_pretrained(path)


def test_a_checkpoint_of_another_class_is_rejected(folder: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: model must be 'Tokenizer', got 'Small'"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json is not JSON"),
        ('{"model": "Small", "wid', r"config\.json is not JSON"),
        ('{"model": "Small"} x', r"config\.json is not JSON"),
        ("[]", "model must be 'Small', got None"),
        ("null", "model must be 'Small', got None"),
    ],
)
def test_a_config_that_is_no_json_object_is_rejected(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Small.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "width: Field required"),
        ({"width": 0}, "width: .*got 0"),
        ({"width": "2"}, "width: .*got '2'"),
        ({"width": 2, "wdith": 3}, "wdith: .*got 3"),
    ],
)
def test_a_config_with_a_wrong_field_is_rejected_by_name(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    (folder / "config.json").write_text(json.dumps({"model": "Small", **fields}))
    with pytest.raises(InputError, match=message) as caught:
        Small.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("weight"), "lacks 1 weights, the first is 'weight'"),
        (lambda w: w.update(bias=torch.zeros(2)), "has unknown 1 weights, the first is 'bias'"),
        (
            lambda w: w.update(weight=torch.zeros(3, 2)),
            r"'weight' must have shape \(2, 3\), got \(3, 2\)",
        ),
        (lambda w: w.update(weight=w["weight"].double()), r"be of type torch\.float32, got torch"),
        (lambda w: w["weight"].fill_(torch.nan), "'weight' must be finite, got NaN or infinity"),
    ],
)
def test_weights_that_are_not_the_config_s_are_rejected(
    folder: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_weights(folder, edit)
    with pytest.raises(InputError, match=message):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 4, 30, -1])
def test_a_truncated_weight_file_is_rejected(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Small.from_pretrained(folder)


def test_a_pickle_in_place_of_weights_is_rejected_unread(folder: Path) -> None:
    torch.save({"weight": torch.zeros(2, 3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        Small.from_pretrained(folder)


def test_an_absent_weight_file_is_rejected(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        Small.from_pretrained(folder)
    with pytest.raises(InputError, match="no such file"):
        load_safetensors(folder)


def test_a_changed_bit_of_the_weights_is_rejected(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged: it does not match its"):
        Small.from_pretrained(folder)


def test_a_config_that_is_not_the_one_of_the_weights_is_rejected(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(InputError, match=r"config\.json is damaged: it does not match the hash"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_weights_from_elsewhere_need_no_hashes(folder: Path, header: dict[str, str] | None) -> None:
    weights = {name: own + 1 for name, own in Small.from_pretrained(folder).state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", header)
    assert torch.equal(Small.from_pretrained(folder).weight, weights["weight"])


def test_a_damaged_header_does_not_pass_for_weights_from_elsewhere(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    with pytest.raises(InputError, match=r"must have 'sha256' or no metadata, got sha257"):
        Small.from_pretrained(folder)


def test_weights_that_do_not_fit_leave_the_module_alone() -> None:
    module = Small(SmallConfig(width=2))
    before = module.content_hash()
    for weights in (
        {"weight": torch.zeros(2, 3)},
        {"weight": torch.zeros(2, 2), "count": torch.tensor(0)},
    ):
        with pytest.raises(InputError, match="elsewhere"):
            load_weights(module, weights, "elsewhere")
    assert module.content_hash() == before


# Interrupted writes.


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "number", "name"),
    [
        (SafetensorError("I/O error: No space left (os error 28)"), errno.ENOSPC, "a/b"),
        (OSError(errno.ENOSPC, "No space left"), errno.ENOSPC, "a/b"),
        (OSError(errno.ENOSPC, "No space left", "c"), errno.ENOSPC, "c"),
    ],
)
def test_an_error_of_writing_names_the_file(error: Exception, number: int, name: str) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(Path("a/b")):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, name)


def test_other_errors_of_safetensors_stay_what_they_are() -> None:
    with pytest.raises(SafetensorError, match="something else"), naming(Path("a/b")):
        raise SafetensorError("something else")


def test_an_interrupted_save_keeps_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Small.from_pretrained(folder).content_hash()

    def interrupted(weights: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
        path.write_bytes(b"half of the weights")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Small(SmallConfig(width=4)).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert Small.from_pretrained(folder).content_hash() == expected


# Configs.


def test_complaints_stand_on_one_line_and_name_their_fields() -> None:
    with pytest.raises(ValidationError) as caught:
        SmallConfig.model_validate({"width": -1, "height": 2})
    message = describe_validation_error(caught.value)
    assert "\n" not in message
    assert "width: " in message
    assert "height: " in message
    assert "got -1" in message
