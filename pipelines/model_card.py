"""The model card: README.md beside saved models, for those who did not train them."""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import JsonValue

from tokenizer.config import CodeMapConfig
from tokenizer.storage.configs import StrictConfig, validate_fields
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json

CARD = "README.md"


class Measurement(StrictConfig):
    """One number and how it came about."""

    value: JsonValue
    protocol: dict[str, JsonValue]
    note: str = ""


class Measurements(StrictConfig):
    """A file of evaluation/."""

    command: str
    metrics: dict[str, Measurement]


def load_measurements(source: Path | None, names: Sequence[str]) -> dict[str, Measurements]:
    """What `python -m pipelines.evaluate` left in a run, without the folders of this machine.

    Raises:
        InputError: a file is not as `python -m pipelines.evaluate` writes it.
    """
    found = {}
    for name in names:
        path = (source or Path()) / "evaluation" / f"{name}.json"
        if source is not None and path.is_file():
            found[name] = validate_fields(Measurements, _public(read_json(path)), str(path))
    return found


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return without_folders(value) if isinstance(value, str) else value


def without_folders(text: str) -> str:
    """Absolute paths shortened to their last part: a page may be handed on, folders should not."""
    return re.sub(r"""(?<![^\s"'=])/\S*/""", "…/", text)


def write_measurements(folder: Path, measurements: Mapping[str, Measurements]) -> None:
    """Writes evaluation/ again, so that a copy of the models keeps its numbers."""
    for name, measured in measurements.items():
        path = folder / "evaluation" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = measured.model_dump_json(indent=2, exclude_defaults=True) + "\n"
        replace_file(path, functools.partial(Path.write_text, data=text))


def write_card(
    path: Path, pipeline: str, sizes: Mapping[str, str], measurements: Mapping[str, Measurements]
) -> None:
    """Writes a card with what is known, and places to fill in.

    Args:
        path: of the file.
        pipeline: name of the class that loads the models.
        sizes: what to say of them first.
        measurements: from `load_measurements`.
    """
    has_prior = pipeline != "TokenizerPipeline"
    text = _CARDS.get_template("model_card.md.jinja").render(
        pipeline=pipeline,
        has_prior=has_prior,
        task="unconditional-image-generation" if has_prior else "image-feature-extraction",
        sizes=sizes,
        measurements={name: _tables(measured) for name, measured in measurements.items()},
    )
    replace_file(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def _tables(measured: Measurements) -> dict[str, Any]:
    """The numbers, and each protocol once, with the names of those that have it."""
    names: dict[str, list[str]] = {}
    for name, entry in measured.metrics.items():
        names.setdefault(json.dumps(entry.protocol, indent=2, ensure_ascii=False), []).append(name)
    protocols = [(text, ", ".join(group)) for text, group in names.items()]
    return {"numbers": measured.metrics, "protocols": protocols}


def _cell(value: Any) -> str:
    """A value in a table of Markdown, which nothing in it can leave."""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = f"{value:.5g}" if isinstance(value, float) else str("none" if value is None else value)
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def describe_codes(code_maps: Sequence[CodeMapConfig]) -> str:
    """Maps and bits of an image, in words."""
    maps, bits = [], 0.0
    for code_map in code_maps:
        sizes = code_map.codebook_sizes
        maps.append(f"{code_map.height} x {code_map.width} of {' + '.join(map(str, sizes))}")
        bits += code_map.height * code_map.width * sum(map(math.log2, sizes))
    return f"{', '.join(maps)}; {bits:,.0f} bits per image"


_CARDS = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False
)
_CARDS.filters["cell"] = _cell
