"""The weights of a model folder: one safetensors file, or several and an index.

The index is Hugging Face's, `model.safetensors.index.json`. Each saving gives the files that it
names other names, so that the index alone decides which belong together, and is replaced in one
instant.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json, shortened
from tokenizer.storage.untrusted import StoredTensor, load_safetensors, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
"""Of the weights in one file, unless one of them alone is larger."""


class WeightFiles(NamedTuple):
    """Where the weights of a folder lie."""

    source: Path
    """What to name where something is wrong with them: the one file, or the index."""
    paths: tuple[Path, ...]
    header: dict[str, StoredTensor]
    """Types and shapes in all files."""
    metadata: Mapping[str, str]
    """What was saved with the weights: hashes."""

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """The weights, file by file, on the CPU."""
        return map(load_safetensors, self.paths)


def has_weights(folder: Path) -> bool:
    """Whether weights of a model lie in a folder."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    metadata: dict[str, str],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes contiguous weights atomically: those that were there stay whole until the end."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if filled + sizes[name] > max_file_bytes and groups[-1]:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += sizes[name]
    if len(groups) == 1:
        path = folder / SINGLE
        replace_file(path, lambda file: safetensors.torch.save_file(groups[0], file, metadata))
        _remove_others(folder, {SINGLE})
        return
    mark = next(iter(metadata.values())).split()[1][:8]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file_name = f"model-{mark}-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_group(folder / file_name, group)
        weight_map |= dict.fromkeys(group, file_name)
    index = {
        "metadata": {"total_size": sum(sizes.values()), **metadata},
        "weight_map": weight_map,
    }
    text = json.dumps(index, indent=2) + "\n"
    replace_file(folder / INDEX, lambda path: path.write_text(text))
    _remove_others(folder, {INDEX, *weight_map.values()})


def _write_group(path: Path, group: dict[str, Tensor]) -> None:
    replace_file(path, lambda file: safetensors.torch.save_file(group, file, {"format": "pt"}))


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Removes the weights of an earlier saving; the index first, which would name them."""
    found = [folder / INDEX, folder / SINGLE, *sorted(folder.glob("model-*-of-*.safetensors"))]
    for path in found:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def find_weights(folder: Path) -> WeightFiles:
    """The files of a folder, of whose tensors nothing is read.

    Raises:
        InputError: there are none, or they are damaged or do not belong together.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or not index.is_file():
        stored = read_header(single)
        with safetensors.safe_open(single, "pt") as file:
            return WeightFiles(single, (single,), stored, file.metadata() or {})
    fields = read_json(index)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} must have a weight_map with the file of each weight")
    for name in weight_map.values():
        is_plain = isinstance(name, str) and Path(name).name == name
        if not is_plain or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: weight_map must name safetensors files beside it, "
                f"got {shortened(repr(name))}"
            )
    names = list(dict.fromkeys(weight_map.values()))
    header: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for name in names:
        found_here = read_header(folder / name)
        header |= found_here
        places |= {weight: name for weight in found_here}
    if places != weight_map:
        differing = min(
            weight
            for weight in places.keys() | weight_map.keys()
            if places.get(weight) != weight_map.get(weight)
        )
        raise InputError(
            f"{index} does not fit the files that it names: the first weight in another place is "
            f"{shortened(repr(differing))}"
        )
    metadata = fields.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    hashes = {key: value for key, value in metadata.items() if isinstance(value, str)}
    return WeightFiles(index, tuple(folder / name for name in names), header, hashes)
