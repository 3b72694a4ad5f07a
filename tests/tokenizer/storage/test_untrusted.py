"""Files from strangers: refused before memory is taken, and never executed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tests.tokenizer.tiny import HYBRID
from tokenizer import InputError, Tokenizer
from tokenizer.config import BackboneConfig, CodeMapConfig
from tokenizer.storage.json_files import parse_json, read_json, shortened
from tokenizer.storage.untrusted import StoredTensor, read_header


def test_json_with_plain_values_is_read_as_it_stands() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "ü"}], "b": json.loads("[" * 31 + "]" * 31)}
    assert parse_json(json.dumps(value).encode(), "x") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "x is not JSON: ") for text in (b"{", b"\xef\xbb\xbf{}", b"9" * 5000)),
        (b'{"a": 1, "a": 1}', "x is not JSON: a key stands twice in one object"),
        (b"[NaN]", "x is not JSON: NaN is no JSON number"),
        (b"[-Infinity]", "x is not JSON: -Infinity is no JSON number"),
        ("{}".encode("utf-16"), "x is not JSON: "),
        *((text, "x is nested deeper than 32") for text in (b"[" * 33 + b"]" * 33, b"[" * 10**6)),
    ],
)
def test_json_of_doubtful_meaning_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_json(text, "x")
    assert len(str(caught.value)) < 500


def test_a_long_file_is_not_read_and_foreign_text_is_shown_on_one_short_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "long").write_bytes(b" " * (2**22 + 1))
    with pytest.raises(InputError, match="long must have at most 4194304 bytes, got more"):
        read_json(tmp_path / "long")
    assert shortened("ünïcode") == "ünïcode"
    assert shortened("a\n\x1b[2J") == r"'a\n\x1b[2J'"
    assert len(shortened("x" * 10**6)) < 400


# Headers of weights


def test_a_header_tells_types_and_shapes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, dtype=torch.int64), "c": torch.ones(())}
    save_file(tensors, tmp_path / "file", {"by": "us"})
    assert read_header(tmp_path / "file") == {
        name: StoredTensor(own.dtype, tuple(own.shape)) for name, own in tensors.items()
    }


def entry(dtype: str = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> Any:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


TOO_LONG = 5 * 2**20


@pytest.mark.parametrize(
    ("header", "length"),
    [
        *(([1], None), ({"a": 1}, None), (entry("os.system"), None), (entry(shape=[-1]), None)),
        *((entry("F64"), None), (entry(shape=[2**31] * 8), None), (entry(offsets=None), None)),
        *((entry(offsets=[4, 28]), None), ({"b": entry()["a"], **entry()}, None), ({}, None)),
        (entry("F8_E4M3", [24]), None),  # sound, but no model has it
        *((entry(), length) for length in (0, 1, 10**6, 2**63, 2**64 - 1)),
        (entry(), TOO_LONG),  # sound, but it would take many times its length in memory
    ],
)
def test_a_header_that_does_not_cover_the_file_exactly_or_is_too_long_is_refused(
    header: object, length: int | None, tmp_path: Path
) -> None:
    def write(header: object, length: int | None) -> None:
        text = json.dumps(header).encode().ljust(TOO_LONG if length == TOO_LONG else 0)
        number = len(text) if length is None else length
        (tmp_path / "file").write_bytes(number.to_bytes(8, "little") + text + bytes(24))

    write(entry(), None)
    assert set(read_header(tmp_path / "file")) == {"a"}
    write(header, length)
    with pytest.raises(InputError, match="file is damaged or not a safetensors file: "):
        read_header(tmp_path / "file")


# Models


def test_a_config_of_a_larger_model_than_its_weights_is_refused_unbuilt(tmp_path: Path) -> None:
    Tokenizer(HYBRID).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["networks"] |= {"width": 2**14, "max_width": 2**14}
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"must have shape \(16384, .*, got \(8, "):
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
    network = PriorNetworkConfig(width=8, num_spatial_layers=1, num_depth_layers=1, num_heads=1)
    with pytest.raises(InputError, match="code_maps must give at most 1024 codes in a step"):
        Prior(PriorConfig(network=network, code_maps=(code_map,)))


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet10t", "hf_hub:a/b", "../x", "a b", "", "ä"])
def test_a_backbone_that_is_no_name_of_the_registry_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be one of timm's registry, such as"):
        BackboneConfig(name=name)


def test_a_loaded_model_uses_no_random_numbers_more_than_a_built_one(tmp_path: Path) -> None:
    Tokenizer(HYBRID).save_pretrained(tmp_path)
    draws = []
    for build in (lambda: Tokenizer(HYBRID), lambda: Tokenizer.from_pretrained(tmp_path)):
        torch.manual_seed(0)
        build()
        draws.append(torch.rand(1))
    assert draws[0] == draws[1]
