"""Files of weights as a stranger could craft them."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.faults.crafted import MARKER, Crafted, choose

# The header of the weights


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def join(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Writes what claims to be a safetensors file."""
    claimed = len(header) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + header + data)


def header_length(generator: np.random.Generator, folder: Path) -> Crafted:
    """Claims a header of another length."""
    path = folder / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header).encode()
    lengths = [0, 1, len(text) - 1, len(text) + 1, 10**9, 10**15, 2**63 - 1, 2**63, 2**64 - 1]
    length = choose(generator, lengths)
    join(path, text, data, length)
    return Crafted(f"a header length of {length}")


def header_entry(generator: np.random.Generator, folder: Path) -> Crafted:
    """Claims another type, shape or place of one tensor."""
    path = folder / "model.safetensors"
    header, data = split(path)
    name = choose(generator, sorted(header.keys() - {"__metadata__"}))
    entry, (first, last) = header[name], header[name]["data_offsets"]
    odd_types: list[Any] = ["F64", "F16", "I8", "F4", "", "os.system", None, 3, []]
    odd_shapes: list[Any] = [[10**12], [2**62, 2**62], [2**31] * 8, [0], [-1], [1.5], [None], []]
    odd_shapes += [None, "x", [[1]], {}, [1] * 100_000, [True], [10**30], [float("nan")]]
    values: list[tuple[str, Any]] = [
        *(("dtype", own) for own in odd_types),
        *(("shape", own) for own in odd_shapes),
        ("data_offsets", [first, 10**18]),
        ("data_offsets", [last, first]),
        ("data_offsets", [first + 4, last + 4]),
        ("data_offsets", [0, last - first]),
        ("data_offsets", [-(last - first), 0]),
        ("data_offsets", [first]),
        ("data_offsets", [first, last, last]),
        ("data_offsets", None),
        ("more", "x"),
    ]
    field, value = choose(generator, values)
    if entry.get(field) == value or (field, value) == ("data_offsets", [first, last]):
        return Crafted(f"{name} as it was", is_valid=True)
    entry[field] = value
    join(path, json.dumps(header).encode(), data)
    return Crafted(f"{field} of {name}: {str(value)[:80]}")


def header_text(generator: np.random.Generator, folder: Path) -> Crafted:
    """Writes a header that is no such object."""
    path = folder / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header)
    deep = int(choose(generator, [100, 10_000, 1_000_000]))
    texts: dict[str, Callable[[], str]] = {
        "a list": lambda: "[1]",
        "empty": lambda: "",
        "no object": lambda: '"x"',
        "deep lists": lambda: "[" * deep + "]" * deep,
        "deep objects": lambda: '{"a":' * deep + "1" + "}" * deep,
        "an open nest": lambda: "[" * deep,
        "no JSON": lambda: text[:-1],
        "a key twice": lambda: text[:-1] + "," + text[1:],
        "many lists": lambda: "[" + "[]," * 1_000_000 + "[]]",
        "a long number": lambda: '{"a":' + "9" * 100_000 + "}",
        "another encoding": lambda: text.encode("utf-16").decode("latin-1"),
        "a long name": lambda: json.dumps({**header, "x" * 10**6: {}}),
        "a lacking entry": lambda: json.dumps(dict(list(header.items())[:-1])),
        "an entry too many": lambda: json.dumps(
            {**header, "\n\x1b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
        ),
        "100,000 empty entries": lambda: json.dumps(
            {str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
        ),
    }
    kind = choose(generator, sorted(texts))
    join(path, texts[kind]().encode(), data)
    return Crafted(f"a header with {kind}, {deep}")


def other_weights(generator: np.random.Generator, folder: Path) -> Crafted:
    """A sound safetensors file whose tensors are not those of the config."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = choose(generator, sorted(weights))
    kind = choose(
        generator, ["type", "shape", "NaN", "infinity", "name", "lack", "gigantic", "empty file"]
    )
    if kind == "type":
        weights[name] = weights[name].to(torch.float64)
    elif kind == "shape":
        weights[name] = torch.cat([weights[name][None]] * 2)
    elif kind in ("NaN", "infinity"):
        weights[name] = torch.full_like(weights[name], float("nan" if kind == "NaN" else "inf"))
    elif kind == "name":
        weights["stranger.\n"] = weights.pop(name)
    elif kind == "lack":
        del weights[name]
    save_file({} if kind == "empty file" else weights, path)
    if kind == "gigantic":  # a sparse file: sound, but of a terabyte
        header, data = split(path)
        size = 2**40
        header["zzz"] = {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [len(data), len(data) + size],
        }
        join(path, json.dumps(header).encode(), data)
        os.truncate(path, path.stat().st_size + size)
    return Crafted(f"weights with another {kind} at {name}")


# Pickles, and files that are damaged anywhere


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickles(generator: np.random.Generator, folder: Path) -> Crafted:
    """Pickles with a payload, beside the files or in place of one."""
    payload = Payload(folder.parent / MARKER)
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "__init__.py", "config.py"]
    for name in names:
        torch.save({"weight": payload}, folder / name)
    kind = choose(generator, ["beside", "model.safetensors", "config.json", "header"])
    if kind in ("model.safetensors", "config.json"):
        with (folder / kind).open("wb") as file:
            if generator.integers(2):
                pickle.dump(payload, file)
            else:
                torch.save({"weight": payload}, file)
    elif kind == "header":
        _, data = split(folder / "model.safetensors")
        join(folder / "model.safetensors", pickle.dumps(payload), data)
    return Crafted(f"pickles, {kind}", is_valid=kind == "beside")


def damage(generator: np.random.Generator, folder: Path) -> Crafted:
    """Some bytes anywhere are changed, or the end is cut off."""
    path = folder / choose(generator, ["model.safetensors", "config.json"])
    content = bytearray(path.read_bytes())
    if generator.integers(3) == 0:
        end = int(generator.integers(len(content)))
        path.write_bytes(content[:end])
        return Crafted(f"{path.name} cut at {end}", path.name == "config.json")
    for place in generator.integers(min(len(content), 4096), size=int(generator.integers(1, 9))):
        content[int(place)] ^= 1 << int(generator.integers(8))
    path.write_bytes(content)
    return Crafted(f"bits of {path.name} flipped", is_valid=True)
