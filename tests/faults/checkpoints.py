"""Model folders from strangers: each crafted one is refused, without memory, time or a pickle."""

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipelines import ImageGenerationPipeline
from prior import PriorConfig
from tests.faults.configuration import ODD, places, small_pipeline
from tests.faults.damage import spoiled
from tests.faults.jobs import in_child
from tokenizer import InputError, TokenizerConfig

NUM_TRIALS = 500
MEMORY = 2**29
SECONDS = 20
LONGEST_MESSAGE = 2_500
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect")
MARKER = "executed"
"""Name of the file that a pickle leaves beside the models if it is ever executed."""


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Loads a crafted copy of a small pipeline; the first one is left as it is."""
    sound, copy = folder / "sound", folder / "copy"
    if not sound.exists():
        small_pipeline().save_pretrained(sound)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sound, copy)
    what, is_valid = "nothing", True
    if number:
        craft = CRAFTS[number % len(CRAFTS)]
        what, is_valid = craft(copy / ("tokenizer", "prior")[generator.integers(2)], generator)
    outcome = in_child(lambda: load(copy), MEMORY, SECONDS)
    if (copy / MARKER).exists():
        outcome = "a pickle was executed"
    complaint = judge(outcome, is_valid)
    return complaint and f"{what}: {complaint}"


def load(folder: Path) -> str:
    """What becomes of loading a folder."""
    events: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN or (event == "import" and "evil" in str(arguments[0])):
            events.append(f"{event} {arguments}")

    sys.addaudithook(note)
    try:
        ImageGenerationPipeline.from_pretrained(folder)
        outcome = "loaded"
    except InputError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return f"{events[0]} after {outcome}" if events else outcome


def judge(outcome: str, is_valid: bool) -> str:
    """What is wrong with an outcome; nothing if it is as promised."""
    if outcome == "loaded":
        return "" if is_valid else "loaded"
    if not outcome.startswith("refused: "):
        return outcome[:500]
    if len(outcome) > LONGEST_MESSAGE or not outcome.isprintable():
        return f"not a printable line of at most {LONGEST_MESSAGE}: {outcome[:200]!r}"
    return ""


# Crafts: each gives what it did, and whether the folder may load, as no reader can see the damage

Craft = Callable[[Path, np.random.Generator], tuple[str, bool]]


def choose(generator: np.random.Generator, options: Any) -> Any:
    """One of the options, with its own type."""
    return options[int(generator.integers(len(options)))]


def header(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """A header of another length, with another entry, or that is no such object."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    old, data = content[8 : 8 + length].decode(), content[8 + length :]
    entries = json.loads(old)
    name = choose(generator, sorted(entries.keys() - {"__metadata__"}))
    first, last = entries[name]["data_offsets"]
    key = choose(generator, ["dtype", "shape", "data_offsets", "more"])
    odd_offsets = [[first, 10**18], [last, first], [first + 4, last + 4], [first - last, 0]]
    odd_shapes = [[10**12], [2**62, 2**62], [2**31] * 8, [-1], [1] * 100_000]
    odd = {"dtype": ["F64"], "shape": odd_shapes, "data_offsets": odd_offsets, "more": []}[key]
    changed = entries | {name: entries[name] | {key: choose(generator, odd + ODD)}}
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    end = len(data) + 2**40
    large = {"dtype": "U8", "shape": [2**40], "data_offsets": [len(data), end]}
    lengths = [0, 1, length - 1, length + 1, 10**9, 10**15, 2**63, 2**64 - 1]
    deep = choose(generator, [100, 10_000, 1_000_000])
    texts = {
        **dict.fromkeys(("a", "b", "c", "d"), json.dumps(changed)),
        **dict.fromkeys(("another length", "a length"), old),
        "lists": "[" * deep + "]" * deep,
        "objects": '{"a":' * deep + "1" + "}" * deep,
        "a key twice": old[:-1] + "," + old[1:],
        "a long number": '{"a":' + "9" * 100_000 + "}",
        "a long name": json.dumps(entries | {"x" * 10**6: {}}),
        "one entry": json.dumps({name: entries[name]}),
        "a strange entry": json.dumps(entries | {"\n\x1b": empty}),
        "many entries": json.dumps(dict.fromkeys(map(str, range(100_000)), empty)),
        "a terabyte": json.dumps(entries | {"zzz": large}),
    }
    what = choose(generator, sorted(texts))
    text = texts[what].encode()
    claimed = choose(generator, lengths) if texts[what] is old else len(text)
    path.write_bytes(claimed.to_bytes(8, "little") + text + data)
    if what == "a terabyte":  # a sparse file: sound
        os.truncate(path, path.stat().st_size + 2**40)
    # What a tensor's entry holds beside its own keys is ignored.
    is_valid = what in "abcd" and (key == "more" or changed == entries)
    return f"a header with {what}, {claimed}: {str(changed[name])[:200]}", is_valid


def other_weights(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """A sound safetensors file whose tensors are not those of the config."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = choose(generator, sorted(weights))
    tensor = weights.pop(name)
    others = {
        "type": {name: tensor.double()},
        "shape": {name: torch.stack([tensor] * 2)},
        "number": {name: torch.full_like(tensor, choose(generator, [np.nan, np.inf]))},
        "name": {"stranger.\n": tensor},
        "lack": {},
    }
    what = choose(generator, sorted(others))
    save_file(weights | others[what], path)
    return f"weights with another {what} at {name}", False


def config_field(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """One field gets an absurd value."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    place, key, _ = choose(generator, places(fields))
    objects = [{"__reduce__": ["os.system", "true"]}, {"_target_": "os.system"}]
    value = choose(generator, [*ODD, *objects, "x" * 10**5, [[]] * 1_000, [10**6] * 10_000])
    is_same, place[key] = place[key] == value, value
    path.write_text(json.dumps(fields))
    return f"{key}: {str(value)[:80]}", is_same


def config_sizes(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """Fields get the largest values that they take, so that their product is absurd."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    kind = TokenizerConfig if folder.name == "tokenizer" else PriorConfig
    bounds = re.findall(
        r'"(\w+)": {[^{}]*(?:{[^{}]*)?"maximum": (\d+)', json.dumps(kind.model_json_schema())
    )
    largest = {name: int(bound) for name, bound in bounds}
    share = generator.uniform(0.1, 1)
    changed = []
    for place, key, _ in places(fields):
        if key in largest and generator.random() < share:
            value = place[key]
            place[key] = [largest[key]] * 64 if isinstance(value, list) else largest[key]
            changed.append(key)
    path.write_text(json.dumps(fields))
    return f"the largest {changed}", not changed


def config_text(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """A config that is no such JSON, or asks for something to be imported or downloaded."""
    path = folder.parent / "tokenizer" / "config.json"
    text = path.read_text()
    deep = choose(generator, [40, 1_000, 1_000_000])
    added = {
        "nested lists": '"a":' + "[" * deep + "]" * deep,
        "many keys": ",".join(f'"key{number}": 1' for number in range(deep)),
        "an object to import": '"auto_map": {"AutoModel": "evil.Model"}',
        "100 MB of blanks": " " * 10**8 + '"a": 1',
    }
    names = ["hf-hub:timm/resnet10t", "local-dir:/tmp", "http://localhost:1/x", "os.system"]
    names += ["x" * 10_000, "vit_gigantic_patch14_224"]
    name = choose(generator, names)
    what = choose(generator, ["a backbone", "a backbone", *added])
    if what == "a backbone":
        assert '"backbone": null' in text
        path.write_text(text.replace('"backbone": null', f'"backbone": {{"name": "{name}"}}'))
    else:
        path.write_text(text.replace("{", "{" + added[what] + ",", 1))
    return f"a config with {what}, {deep}, {name[:80]}", False


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickles(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """Pickles with a payload, beside the files or in place of one."""
    payload = Payload(folder.parent / MARKER)
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "__init__.py"]
    what = choose(generator, ["beside", "model.safetensors", "config.json"])
    for name in [*names, *([] if what == "beside" else [what])]:
        with (folder / name).open("wb") as file:
            if generator.integers(2):
                pickle.dump(payload, file)
            else:
                torch.save({"weight": payload}, file)
    return f"pickles, {what}", what == "beside"


def damage(folder: Path, generator: np.random.Generator) -> tuple[str, bool]:
    """Some bytes anywhere are changed."""
    path = folder / choose(generator, ["model.safetensors", "config.json"])
    content = path.read_bytes()
    path.write_bytes(spoiled(content, generator))
    is_seen = path.stat().st_size != len(content) and path.name == "model.safetensors"
    return f"{path.name} damaged", not is_seen


CRAFTS: tuple[Craft, ...] = (
    header,
    other_weights,
    config_field,
    header,
    config_sizes,
    config_text,
    pickles,
    damage,
)
