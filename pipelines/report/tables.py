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
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.evaluation.protocol import library_versions
from pipelines.generation import ImageGenerationPipeline
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.report import page
from pipelines.run.log import read_metrics

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
    """What the sections of a summary tell about."""

    run_dir: Path
    tokenizer_config: TokenizerRunConfig
    prior_config: PriorRunConfig
    pipeline: ImageGenerationPipeline
    train: ImageDataset
    validation: ImageDataset
    evaluation: dict[str, Any]
    """Contents of evaluation/*.json by name."""
    folder: Path
    """Of the page."""

    def picture(
        self, name: str, content: Image.Image | Figure, alt: str, image_size: int = 0
    ) -> str:
        """Writes a picture beside the page."""
        return page.picture(self.folder / f"{name}.png", content, alt, image_size)


def load_evaluation(folder: Path) -> dict[str, Any]:
    """What `python -m pipelines.evaluate` has left, by name."""
    files = {name: folder / f"{name}.json" for name in ("reconstruction", "generation")}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def measurements(evaluation: dict[str, Any]) -> list[str]:
    """Each number; the protocol that most of them share once, beside others what differs."""
    parts = [page.heading("Measurements")]
    if not evaluation:
        parts.append(page.paragraph("None yet: python -m pipelines.evaluate RUN"))
    for name, results in evaluation.items():
        protocols = [entry["protocol"] for entry in results["metrics"].values()]
        texts = Counter(json.dumps(protocol) for protocol in protocols)
        shared = json.loads(texts.most_common(1)[0][0])
        rows = []
        for metric, entry in results["metrics"].items():
            own = {key: part for key, part in entry["protocol"].items() if part != shared[key]}
            note = "; ".join(f"{_words(key)}: {shown(part) or 'none'}" for key, part in own.items())
            rows.append((metric, shown(entry["value"]), note))
        has_notes = any(note for *_, note in rows)
        parts += [
            page.subheading(name.capitalize()),
            page.table(
                ["", "value", "measured otherwise"] if has_notes else ["", "value"],
                rows if has_notes else [row[:2] for row in rows],
            ),
            page.paragraph("Measured by this protocol:"),
            page.table(
                [], [(_words(key), shown(part)) for key, part in shared.items() if part != {}]
            ),
            page.folded(
                f"{name}.json", _without_folders(json.dumps(results, indent=2, ensure_ascii=False))
            ),
        ]
    return parts


def what_was_run(run: SummarizedRun, durations: Mapping[str, float]) -> list[str]:
    """Models, settings, data, durations in seconds, versions and machine."""
    configs = (run.tokenizer_config, run.prior_config)
    models = (run.pipeline.tokenizer, run.pipeline.prior)
    data, network = run.tokenizer_config.data, run.prior_config.prior
    presets = [
        name
        for name, preset in TOKENIZER_PRESETS.items()
        if preset.tokenizer == run.tokenizer_config.tokenizer
    ]
    maps = [
        f"{own.height}×{own.width} with {' + '.join(map(str, own.codebook_sizes))} codes"
        for own in run.pipeline.prior.config.code_maps
    ]
    depths = (
        f"{network.num_spatial_layers} + {network.num_depth_layers} layers of width {network.width}"
    )
    num_classes = run.pipeline.prior.config.num_classes
    versions = {
        "Python": platform.python_version(),
        **library_versions(),
        **{name: metadata.version(name) for name in ("accelerate", "x-transformers")},
    }
    facts = {
        "tokenizer": f"{run.tokenizer_config.tokenizer.quantizer.kind} quantization, "
        + ", then ".join(maps),
        "as in preset": ", ".join(presets),
        "prior": f"{depths}, order {network.order!r}, "
        + (f"{num_classes} classes" if num_classes else "no classes"),
        "training images": f"{len(run.train):,}: {_without_folders(run.train.description)}",
        "validation images": f"{len(run.validation):,}: "
        + _without_folders(run.validation.description),
        "mirrored": "yes" if data.horizontal_flip or run.prior_config.horizontal_flip else "no",
        "took": ", ".join(f"{name} {_duration(own)}" for name, own in durations.items()),
        "versions": shown(versions),
        "page made on": f"{_processor()}, {os.cpu_count()} cores, "
        f"torch threads: {torch.get_num_threads()}",
    }
    steps = [
        f"{_last_step(config.output_dir.name, run):,} of {config.training.total_steps:,}"
        for config in configs
    ]
    settings = [
        (_words(name), *(shown(getattr(config.training, name)) for config in configs))
        for name in SETTINGS
    ]
    return [
        page.heading("What was run"),
        page.table(
            ["", "tokenizer", "prior"],
            [
                ("parameters", *(f"{_num_parameters(model):,}" for model in models)),
                ("steps", *steps),
                *settings,
            ],
            holds_numbers=True,
        ),
        page.table([], [(name, text) for name, text in facts.items() if text]),
        *(
            page.folded(
                f"{config.output_dir.name}/config.json",
                _without_folders(config.model_dump_json(indent=2)),
            )
            for config in configs
        ),
    ]


def _last_step(stage: str, run: SummarizedRun) -> int:
    steps, _ = read_metrics(run.run_dir / stage, "train")["loss"]
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
        return " · ".join(f"{_words(key)} {shown(own)}" for key, own in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    text = "none" if value is None else _without_folders(str(value))
    return text[:12] + "…" if re.fullmatch("[0-9a-f]{64}", text) else text


def _without_folders(text: str) -> str:
    """Absolute paths shortened to their last part: a page that is handed on tells no folders."""
    return re.sub(r"""(?<![^\s"'=])/\S*/""", "…/", text)
