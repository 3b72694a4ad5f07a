"""What fine-tuning the decoder on hard codes brings, by squared error alone: a row for each cell.

Training mixes codes in ours; the decoder of the fair baseline sees hard codes from the start, so
what it gains comes from the further steps.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.budgets import Budget, run_config
from benchmarks.quality.cells import FAIR, STOCHASTIC, Cell
from benchmarks.quality.grid import grid_energy
from benchmarks.quality.run_cell import BATCH, distance, test_data, write_result
from benchmarks.quality.store import Result
from benchmarks.readme import markdown_table
from pipelines.command_configs import ExtractorConfig
from pipelines.config import DataConfig
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.data.sources import load_images
from pipelines.decoder_run import decoder_run
from pipelines.evaluation.metrics import reconstruction_metrics
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.finetune_decoder import finetune_decoder
from pipelines.images import to_float
from pipelines.model_folders import load_tokenizer
from pipelines.training.loop import make_accelerator
from tokenizer import Tokenizer

TUNED = (STOCHASTIC, FAIR)
"""Methods whose decoders are fine-tuned."""
NUM_GRID_IMAGES = 1_000


def run_tuning(
    cell: Cell, budget: Budget, data: DataConfig, folder: Path, extractor: ExtractorConfig | None
) -> None:
    """Fine-tunes the decoder of a finished cell, and writes `decoder.json` last."""
    started = time.perf_counter(), time.process_time()
    config = run_config(cell, budget, data, folder)
    run = decoder_run(config.run_dir)
    finetune_decoder(run)
    accelerator = make_accelerator(config)
    tokenizer = load_tokenizer(config.run_dir, None).to(accelerator.device)
    test, other = load_images(test_data(data), "validation"), load_images(data, "validation")
    errors, _ = measure_reconstruction(tokenizer, test, np.arange(len(test)), accelerator)
    values: dict[str, Any] = dict(reconstruction_metrics(errors))
    if extractor is not None:
        values |= distance(tokenizer, other, test, budget, folder, extractor, accelerator)
    values["grid"] = grid_of(tokenizer, test)
    original = load_tokenizer(config.output_dir, None).to(accelerator.device)
    tuning = {
        "steps": run.training.total_steps,
        "rate": run.training.learning_rate,
        "grid before": grid_of(original, test),
    }
    write_result(config.run_dir / "decoder.json", {**tuning, "test": values}, started)


def grid_of(tokenizer: Tokenizer, test: ImageDataset) -> float:
    """Of reconstructions of some test images, with the period of the tokenizer's patches."""
    images = to_float(test.images_at(chosen_items(len(test), NUM_GRID_IMAGES)))
    device = next(tokenizer.parameters()).device
    decoded = [tokenizer.reconstruct(part.to(device)).cpu() for part in torch.split(images, BATCH)]
    return grid_energy(torch.cat(decoded), tokenizer.config.networks.patch_size)


def decoder_table(cells: Sequence[Result]) -> str:
    """Hard codes before and after, beside what training saw of mixtures."""
    names = (
        "code maps",
        "method",
        "mixtures",
        "hard codes",
        "fine-tuned",
        "change, %",
        "grid",
        "rFD",
    )
    lines = []
    for cell in cells:
        if "decoder" not in cell:
            continue
        before, after = cell["test"], cell["decoder"]["test"]
        distances = [
            f"{values[name]:.0f}"
            for values in (before, after)
            for name in values
            if name.startswith("rFD") and "floor" not in name
        ]
        error = before.get("mixture_RMSE")
        lines.append(
            [
                cell["shape"],
                cell["title"],
                "" if error is None else f"{100 * error:.2f}",
                f"{100 * before['RMSE']:.2f}",
                f"{100 * after['RMSE']:.2f}",
                f"{100 * (after['RMSE'] / before['RMSE'] - 1):+.1f}",
                f"{cell['decoder']['grid before']:.2f} → {after['grid']:.2f}",
                " → ".join(distances),
            ]
        )
    return markdown_table(names, lines)
