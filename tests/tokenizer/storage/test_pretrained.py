"""Checkpoint folders: exact, strict, and never half written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

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
from tokenizer.storage.pretrained import PretrainedModule, load_weights

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


def test_the_content_hash_tells_weights_config_and_class_apart() -> None:
    class Other(Small):
        pass

    def build(kind: type[Small], width: int) -> Small:
        torch.manual_seed(0)
        return kind(SmallConfig(width=width))

    changed = build(Small, 2)
    with torch.no_grad():
        changed.weight[1, 2] += 1e-6
    modules = [build(Small, 2), build(Small, 3), build(Other, 2), changed]
    assert len({module.content_hash() for module in modules}) == 4
    assert build(Small, 2).content_hash() == build(Small, 2).content_hash()


def test_the_content_hash_covers_a_field_that_leaves_the_weights_alone() -> None:
    quantizers = [NearestQuantizerConfig(decay=decay) for decay in (0.9, 0.99)]
    hashes = []
    for quantizer in quantizers:
        torch.manual_seed(0)
        hashes.append(Tokenizer(deterministic(CONFIG, quantizer)).content_hash())
    assert hashes[0] != hashes[1]


# Checkpoints that do not fit.


def test_a_folder_without_a_checkpoint_is_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"holds no Small: there is no config\.json"):
            Small.from_pretrained(path)


def test_a_checkpoint_of_another_class_is_rejected(folder: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: model must be 'Tokenizer', got 'Small'"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", '{"model": "Small", "wid', "\x00", '{"model": "Small"} x'])
def test_a_config_that_is_not_json_is_rejected(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        Small.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "3", '"Small"', "null"])
def test_a_config_that_is_no_object_is_rejected(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="model must be 'Small', got None"):
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


def test_a_missing_weight_is_rejected(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("weight"))
    with pytest.raises(InputError, match="lacks 1 weights, the first is 'weight'"):
        Small.from_pretrained(folder)


def test_an_extra_weight_is_rejected(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update(bias=torch.zeros(2)))
    with pytest.raises(InputError, match="has unknown 1 weights, the first is 'bias'"):
        Small.from_pretrained(folder)


def test_a_weight_of_another_shape_is_rejected(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update(weight=torch.zeros(3, 2)))
    with pytest.raises(InputError, match=r"'weight' must have shape \(2, 3\), got \(3, 2\)"):
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


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    replace_file(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"


# Configs.


def test_a_config_cannot_change() -> None:
    config = SmallConfig(width=2)
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 3  # type: ignore[misc]


def test_complaints_stand_on_one_line_and_name_their_fields() -> None:
    with pytest.raises(ValidationError) as caught:
        SmallConfig.model_validate({"width": -1, "height": 2})
    message = describe_validation_error(caught.value)
    assert "\n" not in message
    assert "width: " in message
    assert "height: " in message
    assert "got -1" in message
