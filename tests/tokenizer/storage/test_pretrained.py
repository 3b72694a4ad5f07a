"""Checkpoint folders: exact, strict, and never half written."""

import errno
import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from torch import Tensor, nn

from tests.tokenizer.tiny import HYBRID, KINDS, random_images, seeded
from tokenizer import InputError, Tokenizer, TokenizerConfig
from tokenizer.builders import deterministic
from tokenizer.config import BackboneConfig, NearestQuantizerConfig
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.files import replace_file
from tokenizer.storage.hashes import weights_hash
from tokenizer.storage.pretrained import PretrainedModule, load_weights
from tokenizer.storage.untrusted import load_safetensors

BACKBONE = HYBRID.model_copy(update={"backbone": BackboneConfig(name="mobilenetv2_035")})
CONFIGS = {**KINDS, "backbone": BACKBONE}


class SmallConfig(StrictConfig):
    """Parameters of the smallest module."""

    width: PositiveInt


class Small(PretrainedModule[SmallConfig]):
    """The smallest module; format 1 had a field "rate" more, and called `weight` "matrix"."""

    config_class = SmallConfig

    def __init__(self, config: SmallConfig, scale: nn.Module | None = None) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.randn(config.width, 3))
        self.scale = scale

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        if version < 2:
            fields.pop("rate", None)
        return fields

    @classmethod
    def upgrade_weights(cls, weights: dict[str, Any], version: int) -> dict[str, Any]:
        return {"weight" if name == "matrix" else name: own for name, own in weights.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Small(SmallConfig(width=2)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_loaded_tokenizer_is_the_saved_one_to_the_last_bit(
    config: TokenizerConfig, tmp_path: Path
) -> None:
    tokenizer, images = Tokenizer(config), random_images(batch=4).float()
    tokenizer.initialize_from_data(images, seeded(0))
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    loaded = Tokenizer.from_pretrained(str(tmp_path / "a" / "b"))
    assert loaded.config == tokenizer.config
    assert loaded.content_hash() == tokenizer.content_hash()
    assert torch.equal(loaded.reconstruct(images), tokenizer.eval().reconstruct(images))
    assert not any(module.training for module in loaded.modules())
    for found, saved in zip(loaded.parameters(), tokenizer.parameters(), strict=True):
        assert found.requires_grad == saved.requires_grad


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
    quantizers = [NearestQuantizerConfig(decay=decay) for decay in (0.9, 0.99)]
    first, second = (Tokenizer(deterministic(HYBRID, own)) for own in quantizers)
    second.load_state_dict(first.state_dict())
    assert first.content_hash() == second.content_hash()


def test_parts_that_no_config_describes_are_passed_on(tmp_path: Path) -> None:
    scale, other = nn.Linear(2, 2), nn.Linear(2, 2)
    scale.weight = nn.Parameter(scale.weight.detach().T)  # saved as it reads, not as it lies
    Small(SmallConfig(width=2), scale).save_pretrained(tmp_path)
    assert Small.from_pretrained(tmp_path, scale=other).scale is other
    assert torch.equal(other.weight, scale.weight)
    with pytest.raises(InputError, match="has unknown 2 weights"):
        Small.from_pretrained(tmp_path)


# Modules in the place of others


def test_a_module_is_known_as_those_before_it_as_long_as_it_keeps_its_weights(
    tmp_path: Path,
) -> None:
    first, second = Small(SmallConfig(width=2)), Small(SmallConfig(width=2))
    second.load_state_dict(first.state_dict())
    first._former = first.content_hash(), ("a" * 64,)
    second.take_place_of(first)
    second.save_pretrained(tmp_path)
    loaded = Small.from_pretrained(tmp_path)
    assert loaded.former_identities() == (first.content_hash(), "a" * 64)
    half = Small.from_pretrained(tmp_path, torch.bfloat16)
    assert {first.content_hash(), "a" * 64} < {*half.identities()}
    assert not half.has_hash("a" * 64)  # its weights are others
    with torch.no_grad():
        loaded.weight[0, 0] += 1
    assert loaded.former_identities() == ()
    assert {*loaded.identities()} == {loaded.content_hash()}
    loaded.save_pretrained(tmp_path)
    assert Small.from_pretrained(tmp_path).former_identities() == ()
    with pytest.raises(AssertionError):
        loaded.take_place_of(first)


# Earlier formats


def write_first_format(folder: Path, weight: Tensor, rate: str = "1e-05") -> None:
    """What version 0.1 would have written, but without hashes."""
    (folder / "config.json").write_text(f'{{"model": "Small", "width": 2, "rate": {rate}}}')
    safetensors.torch.save_file({"matrix": weight}, folder / "model.safetensors")


def test_a_module_of_format_1_has_both_hashes_as_long_as_it_keeps_its_weights(
    tmp_path: Path,
) -> None:
    write_first_format(tmp_path, torch.ones(2, 3))
    module = Small.from_pretrained(tmp_path)
    assert torch.equal(module.weight, torch.ones(2, 3))
    # As version 0.1 hashed it, with numbers as pydantic writes them.
    text = b'Small{"width":2,"rate":0.00001}matrix torch.float32 (2, 3)'
    old = hashlib.sha256(text + torch.ones(2, 3).numpy().tobytes()).hexdigest()
    assert module.has_hash(old)
    assert module.has_hash(module.content_hash())
    assert not module.has_hash("")
    with torch.no_grad():
        module.weight[0, 0] = 2
    assert not module.has_hash(old)
    module.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields == {"model": "Small", "format": 3, "width": 2}
    assert Small.from_pretrained(tmp_path).content_hash() == module.content_hash()


def test_a_crafted_folder_of_format_1_is_no_way_around_the_checks(tmp_path: Path) -> None:
    write_first_format(tmp_path, torch.ones(3, 2))
    with pytest.raises(InputError, match=r"'weight' must have shape \(2, 3\), got \(3, 2\)"):
        Small.from_pretrained(tmp_path)
    write_first_format(tmp_path, torch.ones(2, 3), rate=r'"\ud800"')  # which cannot be encoded
    assert Small.from_pretrained(tmp_path).config.width == 2


# Checkpoints that do not fit


def config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def field(**fields: object) -> Callable[[Path], object]:
    return config(json.dumps({"model": "Small", **fields}))


def data(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        edit(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no Small: there is no config.json"),
        (config('{"model": "Other"}'), "config.json: model must be 'Small', got 'Other'"),
        (config(""), "config.json is not JSON"),
        (config('{"model": "Small", "wid'), "config.json is not JSON"),
        (config("[]"), "model must be 'Small', got None"),
        (field(), "width: Field required"),
        (field(width=0, height=2), "width: .*got 0; height: .*got 2"),
        (field(width="2"), "width: .*got '2'"),
        (field(width=2, wdith=3), "wdith: .*got 3"),
        (field(width=2, format=4), "format must be at most 3, got 4: a later version has"),
        (field(width=2, format=0), "format must be a whole number from 1, got 0"),
        (field(width=2, format=True), "format must be a whole number from 1, got True"),
        (field(width=2, format="2"), "format must be a whole number from 1, got '2'"),
        (config('{"model": "Small", "format": 2, "width": 2}'), "config.json is damaged"),
        (tensors(lambda w: w.pop("weight")), "lacks 1 weights, the first is 'weight'"),
        (tensors(lambda w: w.update(bias=torch.ones(2))), "unknown 1 weights, .* is 'bias'"),
        (tensors(lambda w: w.update(weight=torch.ones(3, 2))), "'weight' must have shape .2, 3.,"),
        (tensors(lambda w: w.update(weight=w["weight"].double())), "type torch.float32, got torch"),
        (tensors(lambda w: w["weight"].fill_(torch.nan)), "'weight' must be finite, got NaN"),
        (data(lambda content: b""), "model.safetensors is damaged"),
        (data(lambda content: content[:-1]), "model.safetensors is damaged"),
        (data(lambda content: content[:-1] + bytes([content[-1] ^ 1])), "match its own hash"),
        (data(lambda content: content.replace(b"sha256", b"sha257")), "'sha256' or no metadata"),
        (lambda f: torch.save({}, f / "model.safetensors"), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_on_one_line(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        Small.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_weights_from_elsewhere_need_no_hashes(folder: Path, header: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors", header)
    assert torch.equal(Small.from_pretrained(folder).weight, torch.ones(2, 3))


def test_weights_of_one_floating_type_load_and_a_mixture_is_refused(folder: Path) -> None:
    class Pair(Small):
        def __init__(self, config: SmallConfig) -> None:
            super().__init__(config)
            self.other = nn.Parameter(torch.zeros(1))
            self.register_buffer("count", torch.zeros(1).long())

    Pair(SmallConfig(width=2)).bfloat16().save_pretrained(folder)
    loaded = Pair.from_pretrained(folder)
    assert {name: own.dtype for name, own in loaded.state_dict().items()} == {
        "weight": torch.bfloat16,
        "other": torch.bfloat16,
        "count": torch.int64,
    }
    module = Pair.from_pretrained(folder, torch.float32)
    assert module.weight.dtype == torch.float32
    assert module.has_hash(loaded.content_hash())
    module.weight.data[0, 0] += 1
    assert not module.has_hash(loaded.content_hash())
    with pytest.raises(InputError, match=r"dtype must be one of .*, got torch\.int64"):
        Pair.from_pretrained(folder, torch.int64)
    module.weight.data[0, 0] = 1e5
    module.save_pretrained(folder)
    with pytest.raises(InputError, match=r"'weight' must be finite in torch\.float16, got NaN or"):
        Pair.from_pretrained(folder, torch.float16)
    module.other.data = module.other.data.half()
    module.save_pretrained(folder)
    with pytest.raises(InputError, match=r"must be of type torch\.float"):
        Pair.from_pretrained(folder)


def test_weights_that_do_not_fit_leave_the_module_alone() -> None:
    module = Small(SmallConfig(width=2), nn.Linear(1, 1))
    before, zeros = module.content_hash(), torch.zeros(2, 2)
    for weights in ({"weight": zeros}, {**module.state_dict(), "weight": zeros}):
        with pytest.raises(InputError, match="elsewhere"):
            load_weights(module, weights, "elsewhere")
    assert module.content_hash() == before


# Interrupted writes


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (SafetensorError("I/O error: No space left (os error 28)"), "file"),
        (OSError(errno.ENOSPC, "No space left"), "file"),
        (OSError(errno.ENOSPC, "No space left", "other"), "other"),
    ],
)
def test_a_failed_write_names_the_file_keeps_the_old_one_and_leaves_no_other(
    error: Exception, named: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(tmp_path / "file", write)
    assert (caught.value.errno, Path(caught.value.filename).name) == (errno.ENOSPC, named)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_save_keeps_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_safetensors(folder / "model.safetensors")

    def interrupted(weights: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
        path.write_bytes(b"half of the weights")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Small(SmallConfig(width=4)).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert Small.from_pretrained(folder).content_hash() == weights_hash(expected)


def test_a_file_in_place_of_the_folder_is_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "a" / "b"):
        with pytest.raises(
            InputError, match=f"^folder must be .*, got {folder}: {file} is a file$"
        ):
            Small(SmallConfig(width=2)).save_pretrained(folder)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("folder", [None, 5])
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(folder: Any) -> None:
    bare = inspect.unwrap(Tokenizer.from_pretrained.__func__)  # without the tests' type checker
    with pytest.raises(InputError, match=f"^folder must be a path, got {folder}$"):
        bare(Tokenizer, folder)
