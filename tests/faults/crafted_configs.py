"""Configs of models as a stranger could craft them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.crafted import Crafted, choose


def parts_of(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested fields, as container and key."""
    found = []
    for key, own in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(own, dict | list):
            found += parts_of(own)
    return found


def config_field(generator: np.random.Generator, folder: Path) -> Crafted:
    """One field gets an absurd value."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    place, key = choose(generator, parts_of(fields))
    value = choose(
        generator,
        [
            *(10**9, 10**12, 10**30, -1, -(10**30), 1e300, float("nan"), float("inf")),
            *("x" * 10**5, "os.system", "\n\x1b[2J", [[]] * 1000, [10**6] * 10_000),
            *({"__reduce__": ["os.system", "true"]}, {"_target_": "os.system"}),
            {"py/object": "builtins.eval"},
        ],
    )
    place[key] = value
    path.write_text(json.dumps(fields))
    return Crafted(f"{key}: {str(value)[:80]}")


LARGEST = {
    "tokenizer": [
        (("networks", "width"), 2**14),
        (("networks", "max_width"), 2**14),
        (("networks", "num_blocks"), 64),
        (("groups", 0, "code_dim"), 2**14),
        (("groups", 0, "codebook_sizes"), [2**20] * 64),
        (("groups", 0, "downsampling"), 1024),
        (("networks", "max_width"), 2**13),
    ],
    "prior": [
        (("network", "width"), 2**14),
        (("network", "num_spatial_layers"), 64),
        (("network", "num_depth_layers"), 64),
        (("code_maps", 0, "codebook_sizes"), [2**20] * 64),
        (("code_maps", 1, "height"), 4096),
        (("code_maps", 1, "width"), 200),
        (("code_maps", 0, "code_dim"), 2**14),
        (("num_classes",), 10**6),
    ],
}
"""The largest values that the fields take one by one."""


def config_sizes(generator: np.random.Generator, folder: Path) -> Crafted:
    """Some fields get the largest values that they take, so that their product is absurd."""
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    sizes = LARGEST[folder.name]
    count = int(generator.integers(1, len(sizes) + 1))
    chosen = generator.permutation(len(sizes))[:count].tolist()
    for number in chosen:
        *parents, key = sizes[number][0]
        place = fields
        for parent in parents:
            place = place[parent]
        place[key] = sizes[number][1]
    if folder.name == "tokenizer":  # both, as either bounds the other
        networks = fields["networks"]
        networks["width"] = networks["max_width"] = max(networks["width"], networks["max_width"])
    if folder.name == "prior" and generator.integers(2):
        fields["network"]["positions"] = "rotary"
    path.write_text(json.dumps(fields))
    return Crafted(f"the largest sizes of {[sizes[number][0] for number in chosen]}")


def config_text(generator: np.random.Generator, folder: Path) -> Crafted:
    """A config that is no such JSON."""
    path = folder / "config.json"
    text = path.read_text()
    deep = int(choose(generator, [40, 1_000, 1_000_000]))
    nest = "[" * deep + "]" * deep
    many = int(choose(generator, [100, 10_000, 10**6]))

    def beside(field: str) -> str:
        return text.replace("{", "{" + field + ",", 1)

    texts: dict[str, Callable[[], str]] = {
        "nested lists": lambda: beside('"a":' + nest),
        "nothing but lists": lambda: nest,
        "many keys": lambda: beside(",".join(f'"key{n}": 1' for n in range(many))),
        "a key twice": lambda: beside('"model": "Prior"'),
        "NaN": lambda: beside('"a": NaN'),
        "an object to import": lambda: beside('"auto_map": {"AutoModel": "evil.Model"}'),
        "another class": lambda: text.replace('"model": "', '"model": "os.'),
        "100 MB of blanks": lambda: " " * 10**8 + text,
        "a byte order mark": lambda: "\ufeff" + text,
        "a null byte": lambda: text + "\x00",
        "half": lambda: text[: len(text) // 2],
        "nothing": lambda: "",
    }
    kind = choose(generator, sorted(texts))
    path.write_text(texts[kind]())
    return Crafted(f"a config with {kind}, {deep}")


BACKBONES = [
    "hf-hub:timm/resnet10t",
    "hf_hub:a/b",
    "local-dir:/tmp",
    "../../etc/passwd",
    "os.system",
]
BACKBONES += ["a b", "", "resnet10t;evil", "timm/resnet10t", "file:///etc/passwd", "x" * 10_000]
BACKBONES += ["http://localhost:1/x", "vit_gigantic_patch14_224", "regnety_2560", "eva02_enormous"]


def backbone(generator: np.random.Generator, folder: Path) -> Crafted:
    """A backbone that would be downloaded, read elsewhere, imported or gigantic."""
    path = folder.parent / "tokenizer" / "config.json"
    fields = json.loads(path.read_text())
    name = choose(generator, BACKBONES)
    fields["backbone"] = {"name": name}
    path.write_text(json.dumps(fields))
    return Crafted(f"the backbone {name[:80]}")
