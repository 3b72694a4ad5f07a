"""One page about a run: `summary.html` with its images and charts inside, and also beside it."""

import functools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.conditions import trained_conditions
from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.data.sources import trained_images
from pipelines.evaluation.metrics import CodeUsage, reconstruction_metrics
from pipelines.evaluation.protocol import compared_numbers
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import image_grid
from pipelines.model_folders import load_tokenizer
from pipelines.processes import new_accelerator
from pipelines.report.code_pictures import decoded_by_layer
from pipelines.report.page import TEMPLATES, PngImage, columns_of, write_chart, write_image
from pipelines.report.plots import PANELS, curves, usage_chart
from pipelines.report.tables import (
    SummarizedRun,
    load_evaluation,
    measurements,
    shown,
    what_was_run,
)
from pipelines.run.folder import load_run
from pipelines.run.log import read_metrics
from prior import Prior
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file
from tokenizer.storage.weight_files import has_weights

logger = logging.getLogger(__name__)

MOST_CLASSES = 20


def write_summary(
    run_dir: Path,
    path: Path,
    *,
    title: str | None = None,
    durations: Mapping[str, float] | None = None,
    images: tuple[ImageDataset, ImageDataset] | None = None,
    data_root: Path | None = None,
    data_validation_root: Path | None = None,
) -> None:
    """Writes the page to `path`, and its images as PNG files into the same folder.

    The images are made anew from the models, which may still be trained; the measurements are those
    that `python -m pipelines.evaluate RUN` has left, if it was run. To be called in one process.

    Args:
        run_dir: with the first stage at least.
        path: of the HTML file; its folder is made if need be.
        title: heading; None takes the name of `run_dir`.
        durations: seconds, by the name of what took them.
        images: for training and validation, where the tokenizer was given its images, too.
        data_root: where the run's `data.root` has been moved.
        data_validation_root: where the run's `data.validation_root` has been moved.

    Raises:
        InputError: a part of the run or the data is missing or wrong.
    """
    tokenizer_config = load_run(
        TokenizerRunConfig, run_dir / "tokenizer" / "config.json"
    ).moved_data(data_root, data_validation_root)
    accelerator = new_accelerator()
    run = _load_run(run_dir, tokenizer_config, accelerator, images)
    count = min(len(run.validation), tokenizer_config.training.num_validation_images)
    items = chosen_items(len(run.validation), count, tokenizer_config.training.seed)
    errors, usage = measure_reconstruction(run.tokenizer, run.validation, items, accelerator)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = TEMPLATES.get_template("summary.html.jinja").render(
        title=title or run_dir.resolve().name,
        headline=_headline(run, usage, reconstruction_metrics(errors)["PSNR"]),
        reconstructions=_reconstructions(run, path.parent),
        samples=_samples(run, path.parent),
        training=_training(run, path.parent),
        codebooks=_codebooks(usage, count, path.parent),
        measurements=[measurements(name, results) for name, results in run.evaluation.items()],
        what_was_run=what_was_run(run, durations or {}),
    )
    replace_file(path, functools.partial(Path.write_bytes, data=page.encode()))


def _load_run(
    run_dir: Path,
    config: TokenizerRunConfig,
    accelerator: Accelerator,
    images: tuple[ImageDataset, ImageDataset] | None,
) -> SummarizedRun:
    prior_config, pipeline = None, None
    tokenizer = load_tokenizer(run_dir, None).to(accelerator.device)
    prior_model = run_dir / "prior" / "model"
    if (prior_model / "config.json").is_file() and not has_weights(prior_model):
        logger.warning("the prior is left out: %s has no weights yet", prior_model)
    elif (prior_model / "config.json").is_file():
        prior_config = load_run(PriorRunConfig, run_dir / "prior" / "config.json")
        prior = Prior.from_pretrained(prior_model)
        if prior.config.tokenizer_hash in tokenizer.identities():
            pipeline = ImageGenerationPipeline(tokenizer, prior).to(accelerator.device)
        else:
            logger.warning("the prior is left out: it was trained over codes of another tokenizer")
            prior_config = None
    return SummarizedRun(
        run_dir,
        config,
        tokenizer,
        prior_config,
        pipeline,
        *trained_images(config, run_dir / "tokenizer", accelerator, images),
        load_evaluation(run_dir / "evaluation"),
    )


def renew_summary(
    run_dir: Path, data_root: Path | None = None, data_validation_root: Path | None = None
) -> None:
    """Writes `summary.html` into the folder of a run, after a command that changed the run.

    What stands in the way is warned about: the command has done its work. Of several processes, on
    which the measurements would be shared, none writes it.
    """
    if new_accelerator().num_processes > 1:
        logger.info("hqvae summary %s writes its page", run_dir)
        return
    try:
        write_summary(
            run_dir,
            run_dir / "summary.html",
            data_root=data_root,
            data_validation_root=data_validation_root,
        )
    except (InputError, OSError) as error:
        logger.warning("summary.html is not renewed: %s", error)
    else:
        logger.info("%s", run_dir / "summary.html")


def _headline(run: SummarizedRun, usage: CodeUsage, psnr: float) -> dict[str, str]:
    values = {
        "PSNR": f"{psnr:.2f} dB",
        "an image": f"{8 * math.prod(image_shape(run.validation)):,} bits",
        "its codes": f"{sum(usage.nominal_bits()):,.0f} bits",
    }
    if run.prior_config is not None:
        bits = read_metrics(run.run_dir / "prior", "validation").get("bits_per_image")
        if bits:
            values["under the prior"] = f"{bits[1][-1]:,.0f} bits"
    for results in run.evaluation.values():
        for name, entry in results["metrics"].items():
            if re.fullmatch(r"r?(FID|FD-.*)(?<! floor)", name):
                numbers = compared_numbers(entry["protocol"])
                values[f"{name}, {numbers} images"] = shown(entry["value"])
    return values


def _training(run: SummarizedRun, folder: Path) -> dict[str, PngImage]:
    """Curves of the stages that have saved a model, and of the fine-tuning of the decoder."""
    stages = ["tokenizer"]
    if (run.run_dir / "decoder" / "model").is_dir():
        stages.append("decoder")
    if run.prior_config is not None:
        stages.append("prior")
    return {
        stage: write_chart(
            folder / f"curves_{stage}.png",
            curves(run.run_dir / stage, PANELS[stage]),
            f"curves of the {stage}",
        )
        for stage in stages
    }


def _reconstructions(run: SummarizedRun, folder: Path) -> dict[str, Any]:
    """Originals above their reconstructions, and these from the first layers alone."""
    size = image_shape(run.validation)[-1]
    columns = min(columns_of(size), len(run.validation))
    num_bands = min(2, len(run.validation) // columns)
    chosen = np.linspace(0, len(run.validation) - 1, num_bands * columns).astype(np.int64)
    originals = run.validation.images_at(chosen)
    decoded, layer_labels = decoded_by_layer(run.tokenizer, originals)
    # (bands, original or reconstruction, columns, C, H, W)
    bands = (num_bands, columns, *originals.shape[1:])
    pairs = torch.stack([originals.view(bands), decoded[-1].view(bands)], 1)
    stack = torch.cat([images[:columns] for images in [*decoded, originals]])
    return {
        "pairs": write_image(
            folder / "reconstructions.png",
            image_grid(pairs.flatten(0, 2), columns),
            "originals above their reconstructions",
            size,
        ),
        "pair_labels": ["original", "reconstruction"] * num_bands,
        "progressive": write_image(
            folder / "progressive.png", image_grid(stack, columns), "from the first layers", size
        ),
        "layer_labels": [*layer_labels, "original"],
    }


def _samples(run: SummarizedRun, folder: Path) -> dict[str, Any] | None:
    if run.pipeline is None or run.prior_config is None:
        return None
    size = image_shape(run.train)[-1]
    columns = columns_of(size)
    num_classes = run.pipeline.prior.config.num_classes
    names = run.train.class_names[: min(num_classes, MOST_CLASSES)]
    num_rows = len(names) or 4
    conditions = trained_conditions(
        run.run_dir / "prior",
        run.pipeline.prior.config,
        run.tokenizer_config.data,
        (run.train, run.validation),
        run.pipeline.device,
    )
    items = np.arange(num_rows * columns) % len(run.validation)
    temperature, guidance = run.prior_config.sampling_temperature, run.prior_config.guidance_scale
    images = run.pipeline(
        num_rows * columns,
        np.arange(num_rows).repeat(columns).tolist() if names else None,
        temperature=temperature,
        guidance_scale=guidance,
        condition=conditions and conditions[1].at(items),
        progress=False,
        output="tensor",
    )
    assert isinstance(images, torch.Tensor)
    grid = image_grid(images, columns)
    return {
        "grid": write_image(folder / "samples.png", grid, "generated images", size),
        "class_names": names,
        "num_classes": num_classes,
        "temperature": f"{temperature:g}",
        "guidance": f"{guidance:g}",
    }


def _codebooks(usage: CodeUsage, count: int, folder: Path) -> dict[str, Any]:
    nominal, marginal = usage.nominal_bits(), usage.marginal_bits()
    columns = (usage.counts, usage.perplexity(), usage.usage(), nominal, marginal)
    rows = [
        (
            f"layer {number}",
            len(counts),
            f"{perplexity:.1f}",
            f"{share:.1%}",
            f"{n:,.1f}",
            f"{m:,.1f}",
        )
        for number, (counts, perplexity, share, n, m) in enumerate(zip(*columns, strict=True), 1)
    ]
    return {
        "num_images": f"{count:,}",
        "chart": write_chart(
            folder / "codebook_usage.png", usage_chart(usage.counts), "how often codes are used"
        ),
        "rows": rows,
        "total": ("all", "", "", "", f"{sum(nominal):,.1f}", f"{sum(marginal):,.1f}"),
    }
