"""One page about a run: `summary.html` with its pictures inside, and also beside it."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.sources import trained_images
from pipelines.evaluation.metrics import CodeUsage, reconstruction_metrics
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import image_grid, to_float, to_uint8
from pipelines.processes import new_accelerator
from pipelines.report import page
from pipelines.report.plots import curves, usage_chart
from pipelines.report.tables import (
    SummarizedRun,
    load_evaluation,
    measurements,
    shown,
    what_was_run,
)
from pipelines.run.folder import load_run
from pipelines.run.log import read_metrics
from tokenizer.storage.files import replace_file

MOST_CLASSES = 20
ROW_WIDTH = 860
"""Pixels on the page for a row of images."""

TOKENIZER_PANELS = {
    "train": (
        "loss",
        "reconstruction",
        "quantization_error",
        "posterior_entropy",
        "rmse",
        "temperature",
        "dequantization_variance",
        "layer_entropy",
    ),
    "validation": ("RMSE", "PSNR", "perplexity", "codebook_usage"),
}
BASELINE_PANELS = {
    "train": ("loss", "reconstruction", "commitment", "rmse"),
    "validation": TOKENIZER_PANELS["validation"],
}
PRIOR_PANELS: dict[str, tuple[str, ...]] = {
    "train": ("loss", "nats_per_layer"),
    "validation": ("bits_per_image",),
}


def write_summary(
    run_dir: Path,
    path: Path,
    *,
    title: str | None = None,
    durations: Mapping[str, float] | None = None,
) -> None:
    """Writes the page to `path`, and its pictures as PNG files into the same folder.

    The pictures are drawn anew from both models; the measurements are those that
    `python -m pipelines.evaluate RUN` has left, if it was run. To be called in one process.

    Args:
        run_dir: with both stages.
        path: of the HTML file; its folder is made if need be.
        title: heading; None takes the name of `run_dir`.
        durations: seconds, by the name of what took them.

    Raises:
        InputError: a part of the run or the data is missing or wrong.
    """
    tokenizer_config = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    prior_config = load_run(PriorRunConfig, run_dir / "prior" / "config.json")
    accelerator = new_accelerator()
    run = SummarizedRun(
        run_dir,
        tokenizer_config,
        prior_config,
        ImageGenerationPipeline.from_pretrained(run_dir).to(accelerator.device),
        *trained_images(tokenizer_config, run_dir / "tokenizer", accelerator),
        load_evaluation(run_dir / "evaluation"),
        path.parent,
    )
    count = min(len(run.validation), tokenizer_config.training.num_validation_images)
    items = chosen_items(len(run.validation), count, tokenizer_config.training.seed)
    errors, usage = measure_reconstruction(
        run.pipeline.tokenizer, run.validation, items, accelerator
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        page.paragraph("A tokenizer for images and a prior over its codes."),
        _headline(run, usage, reconstruction_metrics(errors)["PSNR"]),
        *_reconstructions(run),
        *_samples(run),
        *_training(run),
        *_codebooks(run, usage, count),
        *measurements(run.evaluation),
        *what_was_run(run, durations or {}),
    ]
    data = page.document(title or run_dir.resolve().name, parts)
    replace_file(path, functools.partial(Path.write_bytes, data=data))


def _headline(run: SummarizedRun, usage: CodeUsage, psnr: float) -> str:
    values = {
        "PSNR": f"{psnr:.2f} dB",
        "an image": f"{8 * run.validation.images[0].size:,} bits",
        "its codes": f"{sum(usage.nominal_bits()):,.0f} bits",
    }
    bits = read_metrics(run.run_dir / "prior", "validation").get("bits_per_image")
    if bits:
        values["under the prior"] = f"{bits[1][-1]:,.0f} bits"
    for results in run.evaluation.values():
        for name, entry in results["metrics"].items():
            if re.fullmatch(r"r?(FID|FD-.*)(?<! floor)", name):
                values[name] = shown(entry["value"])
    return page.tiles(values)


def _reconstructions(run: SummarizedRun) -> list[str]:
    size = run.validation.images.shape[1]
    columns = min(_columns(size), len(run.validation))
    num_bands = min(2, len(run.validation) // columns)
    chosen = np.linspace(0, len(run.validation) - 1, num_bands * columns).astype(np.int64)
    originals = run.validation.images_at(chosen)
    indices = run.pipeline.encode(to_float(originals))
    layers = range(1, len(run.pipeline.tokenizer.codebook_sizes) + 1)
    decoded = [to_uint8(run.pipeline.decode(indices, number)).cpu() for number in layers]
    # (bands, original or reconstruction, columns, C, H, W)
    bands = (num_bands, columns, *originals.shape[1:])
    pairs = torch.stack([originals.view(bands), decoded[-1].view(bands)], 1)
    stack = torch.cat([images[:columns] for images in [*decoded, originals]])
    labels = [f"layers 1–{number}" if number > 1 else "layer 1" for number in layers]
    return [
        page.heading("Reconstructions"),
        page.paragraph("Validation images, and what their hard codes keep."),
        page.labelled_rows(
            ["original", "reconstruction"] * num_bands,
            run.picture(
                "reconstructions",
                image_grid(pairs.flatten(0, 2), columns),
                "originals above their reconstructions",
                size,
            ),
        ),
        page.heading("Layer by layer"),
        page.paragraph("The same images, decoded from the first layers alone, coarse to fine."),
        page.labelled_rows(
            [*labels, "original"],
            run.picture("progressive", image_grid(stack, columns), "from the first layers", size),
        ),
    ]


def _samples(run: SummarizedRun) -> list[str]:
    size = run.train.images.shape[1]
    columns = _columns(size)
    num_classes = run.pipeline.prior.config.num_classes
    names = run.train.class_names[: min(num_classes, MOST_CLASSES)]
    num_rows = len(names) or 4
    temperature, guidance = run.prior_config.sampling_temperature, run.prior_config.guidance_scale
    images = run.pipeline(
        num_rows * columns,
        np.arange(num_rows).repeat(columns).tolist() if names else None,
        temperature=temperature,
        guidance_scale=guidance,
        progress=False,
        output="tensor",
    )
    assert isinstance(images, torch.Tensor)
    text = (
        f"Drawn from the prior, not selected: seed 0, temperature {temperature:g}, "
        f"guidance {guidance:g}."
    )
    if len(names) < num_classes:
        text += f" The first {len(names)} of {num_classes} classes."
    image = run.picture("samples", image_grid(images, columns), "generated images", size)
    return [
        page.heading("Samples per class" if names else "Samples"),
        page.paragraph(text),
        page.labelled_rows(names, image) if names else page.figure(image),
    ]


def _training(run: SummarizedRun) -> list[str]:
    is_baseline = run.tokenizer_config.tokenizer.quantizer.kind == "nearest"
    panels = BASELINE_PANELS if is_baseline else TOKENIZER_PANELS
    tokenizer_curves = curves(run.run_dir / "tokenizer", panels)
    prior_curves = curves(run.run_dir / "prior", PRIOR_PANELS)
    return [
        page.heading("Training"),
        page.paragraph(
            "Tokenizer: terms of the loss in nats per image; validation with hard codes. "
            "Layers count from coarse to fine."
        ),
        page.figure(run.picture("curves_tokenizer", tokenizer_curves, "curves of the tokenizer")),
        page.paragraph("Prior: loss in nats per image, exact likelihood of validation codes."),
        page.figure(run.picture("curves_prior", prior_curves, "curves of the prior")),
    ]


def _columns(size: int) -> int:
    """Images that fit into a row, at the scale that `image_grid` takes."""
    cell = (size + 2) * max(1, 64 // size)
    return min(max(ROW_WIDTH // cell, 4), 12)


def _codebooks(run: SummarizedRun, usage: CodeUsage, count: int) -> list[str]:
    nominal, marginal = usage.nominal_bits(), usage.marginal_bits()
    columns = (usage.counts, usage.perplexity(), usage.usage(), nominal, marginal)
    rows = [
        (
            f"layer {number}",
            len(counts),
            f"{effective:.1f}",
            f"{share:.1%}",
            f"{n:,.1f}",
            f"{m:,.1f}",
        )
        for number, (counts, effective, share, n, m) in enumerate(zip(*columns, strict=True), 1)
    ]
    return [
        page.heading("Use of the codebooks"),
        page.paragraph(
            f"Hard codes of {count:,} validation images; the dashed line is even use. "
            "Bits per image: nominal is log2 K per code, marginal an ideal code for these counts."
        ),
        page.figure(
            run.picture("codebook_usage", usage_chart(usage.counts), "how often codes are used")
        ),
        page.table(
            ["", "codes", "perplexity", "used", "nominal bits", "marginal bits"],
            rows,
            total=("all", "", "", "", f"{sum(nominal):,.1f}", f"{sum(marginal):,.1f}"),
            holds_numbers=True,
        ),
    ]
