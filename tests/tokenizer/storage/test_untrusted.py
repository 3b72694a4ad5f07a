"""Files from strangers: refused before memory is taken, and never executed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tokenizer import InputError, Tokenizer, hq_vae
from tokenizer.config import BackboneConfig, CodeMapConfig, NetworkConfig
from tokenizer.storage.untrusted import (
    StoredTensor,
    parse_json,
    read_bounded,
    read_header,
    shortened,
)

NETWORKS = NetworkConfig(width=4, max_width=4, num_blocks=1)


# JSON


def test_json_with_plain_values_is_read_as_it_stands() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "ü"}]}
    assert parse_json(json.dumps(value).encode(), "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "x is not JSON: "),
        (b'{"a": 1, "a": 1}', "x is not JSON: a key stands twice in one object"),
        (b"[NaN]", "x is not JSON: NaN is no JSON number"),
        (b"[-Infinity]", "x is not JSON: -Infinity is no JSON number"),
        (b"\xef\xbb\xbf{}", "x is not JSON: "),
        ("{}".encode("utf-16"), "x is not JSON: "),
        (b"9" * 5000, "x is not JSON: "),
        (b"[" * 33 + b"]" * 33, "x is nested deeper than 32"),
        (b"[" * 10**6, "x is nested deeper than 32"),
    ],
)
def test_json_of_doubtful_meaning_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_json(text, "x")
    assert len(str(caught.value)) < 500


def test_nesting_up_to_the_limit_is_read() -> None:
    assert parse_json(b"[" * 32 + b"]" * 32, "x")


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b" " * (2**18 + 1))
    with pytest.raises(InputError, match="long must have at most 262144 bytes, got more"):
        read_bounded(tmp_path / "long")


def test_foreign_text_is_shown_on_one_short_line() -> None:
    assert shortened("ünïcode") == "ünïcode"
    assert shortened("a\n\x1b[2J") == r"'a\n\x1b[2J'"
    assert len(shortened("x" * 10**6)) < 400


# Headers of weights


def write_weights(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """A sound file of two tensors, but for what is edited."""
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    }
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))


def test_a_header_tells_types_and_shapes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, dtype=torch.int64), "c": torch.ones(())}
    save_file(tensors, tmp_path / "file", {"by": "us"})
    assert read_header(tmp_path / "file") == {
        name: StoredTensor(own.dtype, tuple(own.shape)) for name, own in tensors.items()
    }


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: [1], "its header is no object"),
        (lambda h: h.update(a=1), "'a' must have dtype, shape and data_offsets"),
        (lambda h: h["a"].update(more=1), "'a' must have dtype, shape and data_offsets"),
        (lambda h: h["a"].update(dtype="os.system"), "'a' has an unknown dtype 'os.system'"),
        (lambda h: h["a"].update(shape=[-1]), "'a': shape must be up to 8 whole numbers, got"),
        (lambda h: h["a"].update(shape=[True]), "'a': shape must be up to 8 whole numbers, got"),
        (lambda h: h["a"].update(shape=[1] * 10**5), "'a': shape must be up to 8 whole numbers"),
        (lambda h: h["a"].update(data_offsets=None), "'a': data_offsets must be up to 8 whole"),
        (lambda h: h["a"].update(shape=[10**12]), "'a' has 4000000000000 bytes by its shape, got"),
        (lambda h: h["a"].update(dtype="F64"), "'a' has 48 bytes by its shape, got offsets"),
        (lambda h: h["b"].update(data_offsets=[0, 8]), "overlap or leave a gap at byte 0"),
        (lambda h: h.__delitem__("a"), "overlap or leave a gap at byte 24"),
        (lambda h: h.__delitem__("b"), "its tensors have 24 bytes, it has 32"),
    ],
)
def test_a_header_that_does_not_cover_the_file_exactly_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    write_weights(path, lambda header: None)
    assert set(read_header(path)) == {"a", "b"}
    write_weights(path, edit)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert "is damaged or not a safetensors file: " in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(InputError, match=f"it has 108 bytes and names a header of {length}"):
        read_header(tmp_path / "file")


def test_a_header_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    length = 5 * 2**20
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b" " * length)
    with pytest.raises(InputError, match=f"names a header of {length}"):
        read_header(tmp_path / "file")


# Models


def test_weights_of_another_type_are_refused(tmp_path: Path) -> None:
    Tokenizer(hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS)).double().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must be of type torch\.float32, got torch\.float64"):
        Tokenizer.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS))
    with torch.no_grad():
        tokenizer.decoder.layers[0].weight[0, 0] = torch.nan
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'decoder\.layers\.0\.weight' must be finite, got NaN"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_config_of_a_larger_model_than_its_weights_is_refused_unbuilt(tmp_path: Path) -> None:
    Tokenizer(hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["networks"] |= {"width": 2**14, "max_width": 2**14}
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"must have shape \(16384, .*, got \(4, "):
        Tokenizer.from_pretrained(tmp_path)
    fields["groups"] = [
        {"downsampling": 2**power, "codebook_sizes": [2**20] * 64, "code_dim": 2**14}
        for power in range(10, 0, -1)
    ]
    fields["networks"]["num_blocks"] = 64
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"asks for more weights than model\.safetensors holds"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_prior_over_too_many_codes_is_refused_unbuilt() -> None:
    code_map = CodeMapConfig(height=4096, width=4096, codebook_sizes=(8,), code_dim=4)
    network = PriorNetworkConfig(width=8, body_depth=1, head_depth=1, num_heads=1)
    with pytest.raises(InputError, match="code_maps must give at most 1024 codes in a step"):
        Prior(PriorConfig(network=network, code_maps=(code_map,)))


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/resnet10t", "hf_hub:a/b", "local-dir:/tmp", "../x", "a/b", "a:b", "a b", "", "ä"],
)
def test_a_backbone_that_is_no_name_of_the_registry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be one of timm's registry, such as"):
        BackboneConfig(name=name)


def test_a_loaded_model_uses_no_random_numbers_more_than_a_built_one(tmp_path: Path) -> None:
    config = hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS)
    Tokenizer(config).save_pretrained(tmp_path)
    draws = []
    for build in (lambda: Tokenizer(config), lambda: Tokenizer.from_pretrained(tmp_path)):
        torch.manual_seed(0)
        build()
        draws.append(torch.rand(1))
    assert draws[0] == draws[1]
