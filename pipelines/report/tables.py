"""The tables of a summary: measurements with their protocol, and what was run."""

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipelines.config import PriorRunConfig, RunConfig, TokenizerRunConfig
from pipelines.data.dataset import ImageDataset, image_shape
from pipelines.evaluation.protocol import compared_numbers, library_versions
from pipelines.generation import ImageGenerationPipeline
from pipelines.model_card import without_folders
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.log import read_metrics
from tokenizer import Tokenizer

SETTINGS = (
    "batch_size",
    "learning_rate",
    "schedule",
    "weight_decay",
    "ema_decay",
    "precision",
    "seed",
)


class SummarizedRun(NamedTuple):
    """What the sections of a summary are made from."""

    run_dir: Path
    tokenizer_config: TokenizerRunConfig
    tokenizer: Tokenizer
    prior_config: PriorRunConfig | None
    """None before stage two has saved a model."""
    pipeline: ImageGenerationPipeline | None
    """Likewise."""
    train: ImageDataset
    validation: ImageDataset
    evaluation: dict[str, Any]
    """Contents of evaluation/*.json by name."""


def load_evaluation(folder: Path) -> dict[str, Any]:
    """What `python -m pipelines.evaluate` has left, by name."""
    files = {name: folder / f"{name}.json" for name in ("reconstruction", "generation")}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def measurements(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Each number; the protocol that most of them share once, beside the others what differs."""
    metrics = results["metrics"]
    texts = Counter(json.dumps(entry["protocol"]) for entry in metrics.values())
    shared = json.loads(texts.most_common(1)[0][0])
    rows = []
    for metric, entry in metrics.items():
        differing = {key: value for key, value in entry["protocol"].items() if value != shared[key]}
        notes = [f"{_words(key)}: {shown(value) or 'none'}" for key, value in differing.items()]
        numbers = compared_numbers(entry["protocol"])
        rows.append((metric, shown(entry["value"]), numbers, "; ".join(notes)))
    columns = ["", "value", "images", "measured otherwise"]
    num_columns = 4 if len(texts) > 1 else 3
    return {
        "name": name,
        "columns": columns[:num_columns],
        "rows": [row[:num_columns] for row in rows],
        "notes": [f"{name}: {entry['note']}" for name, entry in metrics.items() if "note" in entry],
        "protocol": [(_words(key), shown(value)) for key, value in shared.items() if value != {}],
        "content": without_folders(json.dumps(results, indent=2, ensure_ascii=False)),
    }


def what_was_run(run: SummarizedRun, durations: Mapping[str, float]) -> dict[str, Any]:
    """Settings of both stages, details (data, durations in seconds, machine), and configs."""
    stages: list[RunConfig] = [run.tokenizer_config]
    models: list[nn.Module] = [run.tokenizer]
    if run.prior_config is not None and run.pipeline is not None:
        stages.append(run.prior_config)
        models.append(run.pipeline.prior)
    steps = [
        f"{_last_step(run.run_dir / stage.output_dir.name):,} of {stage.training.total_steps:,}"
        for stage in stages
    ]
    settings = [
        ("parameters", *(f"{_num_parameters(model):,}" for model in models)),
        ("steps", *steps),
    ]
    for name in SETTINGS:
        settings.append((_words(name), *(shown(getattr(stage.training, name)) for stage in stages)))
    details = _models(run) | _data(run)
    details["took"] = ", ".join(f"{name} {_duration(time)}" for name, time in durations.items())
    details |= _machine()
    return {
        "stages": [stage.output_dir.name for stage in stages],
        "settings": settings,
        "details": [(name, text) for name, text in details.items() if text],
        "configs": {
            f"{stage.output_dir.name}/config.json": without_folders(stage.model_dump_json(indent=2))
            for stage in stages
        },
    }


def _models(run: SummarizedRun) -> dict[str, str]:
    tokenizer = run.tokenizer_config.tokenizer
    size = run.tokenizer_config.data.image_size
    presets = [
        name
        for name, preset in TOKENIZER_PRESETS.items()
        if preset.tokenizer == tokenizer and preset.data.image_size == size
    ]
    maps = [
        f"{code_map.height}×{code_map.width} with "
        f"{' + '.join(map(str, code_map.codebook_sizes))} codes"
        for code_map in run.tokenizer.code_maps(*image_shape(run.validation)[1:])
    ]
    models = {
        "tokenizer": f"{tokenizer.quantizer.kind} quantization, {', then '.join(maps)}",
        "as in preset": ", ".join(presets),
    }
    if run.prior_config is not None and run.pipeline is not None:
        network, prior = run.prior_config.prior, run.pipeline.prior.config
        depths = f"{network.num_spatial_layers} + {network.num_depth_layers} layers"
        classes = f"{prior.num_classes} classes" if prior.num_classes else "no classes"
        models["prior"] = f"{depths} of width {network.width}, order {network.order!r}, {classes}"
    return models


def _data(run: SummarizedRun) -> dict[str, str]:
    is_mirrored = run.tokenizer_config.data.horizontal_flip or (
        run.prior_config is not None and run.prior_config.horizontal_flip
    )
    sets = {"training images": run.train, "validation images": run.validation}
    return {
        **{
            name: f"{len(images):,}: {without_folders(images.description)}"
            for name, images in sets.items()
        },
        "mirrored": "yes" if is_mirrored else "no",
    }


def _machine() -> dict[str, str]:
    versions = {
        "Python": platform.python_version(),
        **library_versions(),
        **{name: metadata.version(name) for name in ("accelerate", "x-transformers")},
    }
    return {
        "versions": shown(versions),
        "page made on": f"{_processor()}, {os.cpu_count()} cores, "
        f"torch threads: {torch.get_num_threads()}",
    }


def _last_step(folder: Path) -> int:
    steps, _ = read_metrics(folder, "train").get("loss", [[0], []])
    return int(steps[-1])


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _processor() -> str:
    """Name of the CPU; Linux keeps it in a file, others tell Python."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _words(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any) -> str:
    """A value of a configuration or a protocol; of long hashes the start."""
    if isinstance(value, dict):
        return " · ".join(f"{_words(key)} {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    text = "none" if value is None else without_folders(str(value))
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{64}", text) else text
