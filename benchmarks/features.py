"""How well features of a tokenizer and of its codes tell classes, beside pixels and PCA.

    python -m benchmarks.features --data DIR --budget cpu

DIR holds train/ and test/ with a folder per class. Trains an SQ-VAE-2 and its deterministic
baseline by the ordinary command, then a linear probe and nearest neighbors on what each gives. What
has finished is not run again. Writes benchmarks/results/features_BUDGET.json and the table in
benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.commands import run_command
from benchmarks.machine import origin
from benchmarks.probes import Labeled, principal_components, probe
from benchmarks.readme import markdown_table, replace_section
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.sources import load_images
from pipelines.evaluation.code_statistics import EncodedImages, code_histograms, encode_images
from pipelines.images import to_float
from pipelines.run.folder import load_run
from pipelines.run.log import read_metrics
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.files import replace_file

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
MODELS = {"SQ-VAE-2": "cifar10-sqvae2", "VQ-VAE-2, fair": "cifar10-vqvae2"}
"""Presets by the names of the table."""


class Budget(NamedTuple):
    """What a machine can run."""

    training: str
    """Options over the presets."""
    num_train: int
    """Images that probes are fitted to."""
    num_test: int
    num_threads: int


CPU = Budget(
    training="--tokenizer.networks.patch-size 4 --tokenizer.networks.width 64 "
    "--tokenizer.networks.max-width 64 --tokenizer.networks.num-blocks 2 "
    "--tokenizer.groups.0.downsampling 8 --tokenizer.groups.1.downsampling 4 "
    "--tokenizer.groups.0.codebook-sizes 256 --tokenizer.groups.1.codebook-sizes 256 "
    "--tokenizer.groups.0.code-dim 32 --tokenizer.groups.1.code-dim 32 "
    "--training.batch-size 64 --training.learning-rate 4e-3 --training.total-steps 800 "
    "--training.validation-interval 400 --training.checkpoint-interval 400 "
    "--training.num-validation-images 500",
    num_train=5_000,
    num_test=2_000,
    num_threads=1,
)
BUDGETS = {"cpu": CPU}


class Features(NamedTuple):
    """Something to probe."""

    model: str
    name: str
    of: Callable[[], Sequence[Tensor]]
    """Of training and test images, (N, dim) each."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/features-BUDGET")
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    folder = arguments.run_dir or Path("runs") / f"features-{arguments.budget}"
    torch.set_num_threads(budget.num_threads)
    root = arguments.data
    data = (
        f"--data.dataset folder --data.root {shlex.quote(str(root / 'train'))} "
        f"--data.validation-root {shlex.quote(str(root / 'test'))}"
    )
    for preset in MODELS.values():
        run = f"{preset} --run-dir {shlex.quote(str(folder / preset))}"
        options = f"{run} {data} {budget.training}"
        run_command(folder / preset, "train_tokenizer", options, budget.num_threads)
    results = measure(folder, budget)
    training = {
        name: json.loads((folder / preset / "train_tokenizer.done.json").read_text())
        | {"RMSE": read_metrics(folder / preset / "tokenizer", "validation")["RMSE"][1][-1]}
        for name, preset in MODELS.items()
    }
    facts = {
        **origin(f"python -m benchmarks.features {shlex.join(sys.argv[1:])}"),
        "num_train": budget.num_train,
        "num_test": budget.num_test,
        "training": training,
        "results": results,
    }
    path = RESULTS / f"features_{arguments.budget}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    replace_section(f"features-{arguments.budget}", table(facts), PAGE)


def measure(folder: Path, budget: Budget) -> list[dict[str, Any]]:
    """A row for each kind of features; those that `folder` holds already are not made again."""
    path = folder / "probes.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    known = {(row["model"], row["features"]) for row in rows}
    pipelines = {
        name: TokenizerPipeline.from_pretrained(folder / preset) for name, preset in MODELS.items()
    }
    preset = next(iter(MODELS.values()))
    run = load_run(TokenizerRunConfig, folder / preset / "tokenizer" / "config.json")
    train, test = load_images(run.data, "train"), load_images(run.data, "validation")
    encoded = {
        name: [
            encode_images(pipeline.tokenizer, images, chosen_items(len(images), count))
            for images, count in ((train, budget.num_train), (test, budget.num_test))
        ]
        for name, pipeline in pipelines.items()
    }
    for features in every_kind(pipelines, encoded):
        if (features.model, features.name) in known:
            continue
        parts = next(iter(encoded.values()))
        labeled = [
            Labeled(values, part.labels) for values, part in zip(features.of(), parts, strict=True)
        ]
        row = {"model": features.model, "features": features.name, **probe(*labeled)._asdict()}
        print(row, flush=True)
        rows.append(row)
        text = json.dumps(rows, indent=1) + "\n"
        replace_file(path, partial(Path.write_text, data=text))
    return rows


def every_kind(
    pipelines: Mapping[str, TokenizerPipeline], encoded: Mapping[str, Sequence[EncodedImages]]
) -> Iterator[Features]:
    """All that is probed, of training and test images."""
    pixels = [to_float(part.images).flatten(1) for part in next(iter(encoded.values()))]
    yield Features("", "pixels", lambda: pixels)
    num_components = sum(
        group.code_dim for group in next(iter(pipelines.values())).tokenizer.config.groups
    )
    yield Features(
        "",
        f"{num_components} principal components of pixels",
        lambda: principal_components(pixels[0], pixels[1], num_components),
    )
    for model, pipeline in pipelines.items():
        for name, of in kinds_of(pipeline).items():
            yield Features(model, name, partial(_of_parts, of, encoded[model]))


def _of_parts(
    of: Callable[[EncodedImages], Tensor], parts: Sequence[EncodedImages]
) -> list[Tensor]:
    return [of(part) for part in parts]


def kinds_of(pipeline: TokenizerPipeline) -> dict[str, Callable[[EncodedImages], Tensor]]:
    """Features of the codes of images, (N, dim), by name."""

    def in_place(part: EncodedImages) -> Tensor:
        maps = pipeline.features_of_codes(part.indices).maps
        return torch.cat([own.flatten(1) for own in maps], 1)

    kinds: dict[str, Callable[[EncodedImages], Tensor]] = {
        "pooled features": lambda part: pipeline.features_of_codes(part.indices).pooled,
        "code vectors in place": in_place,
    }
    vectors = [layer for group in pipeline.tokenizer.code_vectors() for layer in group]
    for number, codebook in enumerate(vectors):
        kinds[f"layer {number + 1}, how often each code"] = partial(
            _histogram, number, len(codebook)
        )
        kinds[f"layer {number + 1}, code vectors in place"] = partial(_vectors, number, codebook)
    return kinds


def _histogram(layer: int, num_codes: int, part: EncodedImages) -> Tensor:
    return code_histograms(part.layers[layer], num_codes).float()


def _vectors(layer: int, codebook: Tensor, part: EncodedImages) -> Tensor:
    return codebook.float()[part.layers[layer]].flatten(1)


def table(facts: Mapping[str, Any]) -> str:
    """The page's table from the results."""
    header = ["model", "features", "dimensions", "linear, %", "k-NN, %", "k"]
    rows = [
        [
            row["model"] or "none",
            row["features"],
            str(row["dim"]),
            f"{100 * row['linear']:.1f}",
            f"{100 * row['neighbors']:.1f}",
            str(row["num_neighbors"]),
        ]
        for row in facts["results"]
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
