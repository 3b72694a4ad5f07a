"""What the codes of a run mean: `explanation.html`, its numbers as JSON, its pictures beside it."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import ImageDataset, chosen_items, image_hashes
from pipelines.data.sources import trained_images
from pipelines.evaluation.code_statistics import (
    NUM_SHUFFLES,
    EncodedImages,
    class_counts,
    class_entropy,
    class_information,
    encode_images,
    errors_by_layer,
    nearest_others,
    same_class_chance,
    same_class_share,
    shared_codes,
)
from pipelines.evaluation.metrics import CodeUsage
from pipelines.evaluation.protocol import library_versions
from pipelines.evaluation.robustness import Robustness, measure_robustness
from pipelines.images import image_grid
from pipelines.model_card import without_folders
from pipelines.model_folders import load_tokenizer
from pipelines.processes import new_accelerator
from pipelines.report.code_pictures import NUM_CONTEXTS, decoded_by_layer, layer_pictures
from pipelines.report.page import TEMPLATES, columns_of, write_chart, write_image
from pipelines.report.plots import robustness_chart, usage_chart
from pipelines.run.checkpoints import newest_sources
from pipelines.run.folder import load_run
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file

MOST_CODES = 12
"""Of a layer, pictured."""
NUM_CHANGED = 250
"""Images at most that are shifted, blurred, made noisy."""
NUM_QUERIES = 6
NUM_NEIGHBORS = 5
SPACES = ("pooled code vectors", "codes in place", "pixels")
"""In which nearest images are looked for."""


class ExplainedRun(NamedTuple):
    """A tokenizer, and images with its codes."""

    name: str
    tokenizer: Tokenizer
    encoded: EncodedImages
    class_names: tuple[str, ...]
    """Empty where there are not at least two."""


def write_explanation(
    run_dir: Path,
    folder: Path,
    *,
    baseline_dir: Path | None = None,
    num_images: int = 1_000,
    command: str = "",
    data_root: Path | None = None,
    data_validation_root: Path | None = None,
) -> None:
    """Writes `explanation.html`, `explanation.json` and PNG files into `folder`.

    All is of validation images. To be called in one process.

    Args:
        run_dir: with the first stage at least.
        folder: made if need be.
        baseline_dir: another run on the same images, to be measured beside it.
        num_images: chosen at random; at most as many as there are.
        command: that the JSON file names.
        data_root: where the run's `data.root` has been moved.
        data_validation_root: where the run's `data.validation_root` has been moved.

    Raises:
        InputError: a part of a run or the data is missing or wrong, or the baseline was trained on
            other images.
    """
    accelerator = new_accelerator()
    config = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    config = config.moved_data(data_root, data_validation_root)
    folders = [path for path in (run_dir, baseline_dir) if path is not None]
    tokenizers = {path: load_tokenizer(path, None) for path in folders}
    splits = trained_images(config, run_dir / "tokenizer", accelerator)
    if baseline_dir is not None:
        _check_baseline(baseline_dir, image_hashes(*splits))
    validation = splits[1]
    if len(validation) < 2:
        raise InputError("the run must have at least 2 validation images, got 1")
    items = chosen_items(len(validation), num_images, config.training.seed)
    run, *others = (
        _explained(path, tokenizer.to(accelerator.device), validation, items)
        for path, tokenizer in tokenizers.items()
    )
    neighbors = _nearest(run)
    facts = {
        "command": without_folders(command),
        "images": without_folders(validation.description),
        "images_hash": validation.fingerprint,
        "num_images": len(items),
        "num_changed_images": min(NUM_CHANGED, len(items)),
        "seed": config.training.seed,
        "versions": library_versions(),
        "class_entropy_bits": class_entropy(run.encoded.labels) if run.class_names else None,
        "runs": [_described(run, neighbors), *(_described(own, _nearest(own)) for own in others)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = _page(facts, run, neighbors, folder)
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / "explanation.json", functools.partial(Path.write_text, data=text))
    replace_file(folder / "explanation.html", functools.partial(Path.write_bytes, data=page))


def _explained(
    path: Path, tokenizer: Tokenizer, images: ImageDataset, items: Int64[np.ndarray, " images"]
) -> ExplainedRun:
    class_names = images.class_names if len(images.class_names) > 1 else ()
    encoded = encode_images(tokenizer, images, items)
    return ExplainedRun(path.resolve().name, tokenizer, encoded, class_names)


def _check_baseline(baseline_dir: Path, images: Mapping[str, str]) -> None:
    sources = newest_sources(baseline_dir / "tokenizer")
    if sources is not None and any(sources.get(name) != own for name, own in images.items()):
        raise InputError(
            f"baseline must be a run on the same images, got {baseline_dir}, trained on others"
        )


def _described(run: ExplainedRun, neighbors: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of one run."""
    rows = measure_robustness(run.tokenizer, run.encoded.first(NUM_CHANGED))
    return {
        "name": run.name,
        "quantizer": run.tokenizer.config.quantizer.kind,
        "layers": _layers(run),
        "robustness": [row._asdict() for row in rows],
        "nearest_of_same_class": _same_class(run, neighbors) if run.class_names else None,
    }


def _layers(run: ExplainedRun) -> list[dict[str, Any]]:
    """What is to be said of each layer, coarse to fine."""
    encoded = run.encoded
    usage = CodeUsage(run.tokenizer.code_maps(*encoded.images.shape[-2:]))
    usage.update(encoded.indices)
    errors = errors_by_layer(run.tokenizer, encoded)
    layers = []
    for number, codes in enumerate(encoded.layers):
        counts = usage.counts[number]
        layer: dict[str, Any] = {
            "layer": number + 1,
            "height": codes.shape[1],
            "width": codes.shape[2],
            "num_codes": len(counts),
            "perplexity": usage.perplexity()[number],
            "usage": usage.usage()[number],
            "RMSE": errors[number]["RMSE"],
            "PSNR": errors[number]["PSNR"],
            "counts": counts.tolist(),
        }
        top = counts.topk(min(MOST_CODES, int((counts > 0).sum())))
        shares = (top.values.double() / counts.sum()).tolist()
        layer["codes"] = [
            {"code": code, "share": share}
            for code, share in zip(top.indices.tolist(), shares, strict=True)
        ]
        if run.class_names:
            layer["class_bits"] = class_information(codes, encoded.labels, len(counts))._asdict()
            by_class = class_counts(codes, encoded.labels, len(counts))
            for entry in layer["codes"]:
                of_code = by_class[:, entry["code"]]
                entry["class"] = run.class_names[int(of_code.argmax())]
                entry["class_share"] = int(of_code.max()) / int(of_code.sum())
        layers.append(layer)
    return layers


def _nearest(run: ExplainedRun) -> dict[str, Tensor]:
    """By the space, the nearest others of each image."""
    encoded = run.encoded
    codes = [group.to(next(run.tokenizer.parameters()).device) for group in encoded.indices]
    pooled = TokenizerPipeline(run.tokenizer).features_of_codes(codes).pooled.cpu()
    pixels = encoded.images.flatten(1).float()
    similarities = (
        -torch.cdist(pooled, pooled),
        shared_codes(encoded),
        -torch.cdist(pixels, pixels),
    )
    return {
        space: nearest_others(similarity, NUM_NEIGHBORS)
        for space, similarity in zip(SPACES, similarities, strict=True)
    }


def _same_class(run: ExplainedRun, neighbors: dict[str, Tensor]) -> dict[str, float]:
    labels = run.encoded.labels
    shares = {space: same_class_share(found, labels) for space, found in neighbors.items()}
    return {**shares, "any other": same_class_chance(labels)}


def _page(
    facts: dict[str, Any], run: ExplainedRun, neighbors: dict[str, Tensor], folder: Path
) -> bytes:
    """The page of these numbers, with pictures, of which it adds the sizes to the layers."""
    images, size = run.encoded.images, run.encoded.images.shape[-1]
    columns = min(columns_of(size), len(images))
    decoded, labels = decoded_by_layer(run.tokenizer, images[:columns])
    stack = torch.cat([*decoded, images[:columns]])
    chosen = np.linspace(0, len(images) - 1, min(NUM_QUERIES, len(images))).astype(np.int64)
    sections = []
    for number, layer in enumerate(facts["runs"][0]["layers"]):
        codes = [entry["code"] for entry in layer["codes"]]
        pictures = layer_pictures(run.tokenizer, run.encoded, number, codes)
        png = write_image(
            folder / f"codes_{number + 1}.png",
            pictures.grid,
            f"codes of layer {number + 1}",
            pictures.window,
        )
        layer |= {
            "cell": pictures.cell,
            "window": pictures.window,
            "largest_change": pictures.largest_change,
        }
        sections.append({"layer": layer, "png": png})
    page = TEMPLATES.get_template("explanation.html.jinja").render(
        title=f"What the codes of {run.name} mean",
        facts=facts,
        most_codes=MOST_CODES,
        num_contexts=min(NUM_CONTEXTS, len(images)),
        num_shuffles=NUM_SHUFFLES,
        progressive=write_image(
            folder / "layers.png", image_grid(stack, columns), "from the first layers", size
        ),
        layer_labels=[*labels, "original"],
        usage=write_chart(
            folder / "usage.png",
            usage_chart([torch.tensor(layer["counts"]) for layer in facts["runs"][0]["layers"]]),
            "how often codes are used",
        ),
        sections=sections,
        neighbors={
            space: write_image(
                folder / f"nearest_{space.split()[0]}.png",
                image_grid(
                    torch.cat([images[[item, *found[item].tolist()]] for item in chosen]),
                    found.shape[1] + 1,
                    max(1, 48 // size),
                ),
                f"nearest images by {space}",
                size,
            )
            for space, found in neighbors.items()
        },
        robustness=write_chart(
            folder / "robustness.png",
            robustness_chart(
                [
                    (own["name"], [Robustness(**row) for row in own["robustness"]])
                    for own in facts["runs"]
                ]
            ),
            "share of codes kept",
        ),
    )
    return page.encode()
