"""One cell: trains it with the ordinary loop, measures it on the test images."""

import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import commit, machine
from benchmarks.quality.budgets import Budget, run_config
from benchmarks.quality.cell_stage import CellStage
from benchmarks.quality.cells import FAIR, STOCHASTIC, Cell
from pipelines.command_configs import ExtractorConfig
from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.data.sources import load_images
from pipelines.evaluation.distances import extract_features
from pipelines.evaluation.features import load_extractor
from pipelines.evaluation.metrics import (
    frechet_distance,
    metric_name,
    reconstruction_metrics,
)
from pipelines.evaluation.reconstruction import bound_bits_per_dim, measure_reconstruction
from pipelines.images import to_float, to_uint8
from pipelines.processes import seed_everything
from pipelines.run.folder import check_output_dir
from pipelines.run.log import read_metrics
from pipelines.train_prior import prior_stage
from pipelines.training.divergence import DivergenceError
from pipelines.training.loop import make_accelerator, train
from pipelines.training.tokenizer_stage import TokenizerStage
from prior.config import PriorNetworkConfig
from tokenizer import Tokenizer
from tokenizer.storage.files import replace_file

NUM_MIXTURE_IMAGES = 2_000
BATCH = 250


def run_cell(cell: Cell, budget: Budget, data: DataConfig, folder: Path) -> None:
    """Trains, measures errors and use of codes, and writes `result.json` last."""
    started = time.perf_counter(), time.process_time()
    config = run_config(cell, budget, data, folder)
    check_output_dir(config)
    accelerator = make_accelerator(config)
    stage = CellStage(cell, config, accelerator)
    divergence, values = None, {}
    try:
        train(stage, config, accelerator)
    except DivergenceError as error:  # an outcome, too
        divergence = str(error)
    else:
        test = load_images(test_data(data), "validation")
        values = measure(saved_tokenizer(stage, config), stage, test, accelerator)
    metadata = {
        "cell": cell.name,
        "shape": cell.place,
        "family": cell.shape.family,
        "method": cell.method.key,
        "title": cell.title,
        "ablation": cell.ablation,
        "rate": cell.rate,
        "seed": cell.seed,
        "steps": config.training.total_steps,
        "num_parameters": sum(own.numel() for own in stage.model.parameters()),
        "images_per_second": stage.images_per_second(),
        "divergence": divergence,
        "test": values,
        "validation": read_metrics(config.output_dir, "validation"),
        "training": read_metrics(config.output_dir, "train"),
    }
    write_result(config.run_dir / "result.json", metadata, started)


def run_extras(
    cell: Cell, budget: Budget, data: DataConfig, folder: Path, extractor: ExtractorConfig | None
) -> None:
    """What costs more and only the table's rows need: `extras.json`."""
    started = time.perf_counter(), time.process_time()
    config = run_config(cell, budget, data, folder)
    accelerator = make_accelerator(config)
    stage = CellStage(cell, config, accelerator)
    tokenizer = saved_tokenizer(stage, config)
    test = load_images(test_data(data), "validation")
    values: dict[str, float] = {}
    if extractor is not None:
        values |= distance(
            tokenizer, stage.validation_images, test, budget, folder, extractor, accelerator
        )
    if cell.shape in budget.prior_shapes and cell.method in (STOCHASTIC, FAIR):
        values["prior_bits"] = prior_code_length(config, test_data(data), budget.prior_steps)
    write_result(config.run_dir / "extras.json", {"test": values}, started)


def saved_tokenizer(stage: CellStage, config: TokenizerRunConfig) -> Tokenizer:
    """The stage's model with the weights that the run saved for use."""
    stage.model.load_state_dict(load_file(config.output_dir / "model" / "model.safetensors"))
    return stage.model.to(stage.device).eval()


def write_result(path: Path, metadata: dict[str, Any], started: tuple[float, float]) -> None:
    """The metadata, with how they came about."""
    metadata |= {
        "command": f"python -m benchmarks.quality {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - started[0]),
        "cpu_seconds": round(time.process_time() - started[1]),
    }
    text = json.dumps(metadata) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def test_data(data: DataConfig) -> DataConfig:
    """The test images as validation images; without a folder, `shapes` of another seed."""
    if data.dataset == "shapes":
        return data.model_copy(update={"seed": data.seed + 1, "num_validation_images": 10_000})
    assert data.root is not None
    return data.model_copy(update={"validation_root": data.root.parent / "test"})


def measure(
    tokenizer: Tokenizer, stage: TokenizerStage, test: ImageDataset, accelerator: Accelerator
) -> dict[str, Any]:
    """Errors, code use and bits on all test images."""
    errors, usage = measure_reconstruction(tokenizer, test, np.arange(len(test)), accelerator)
    values: dict[str, Any] = {
        **reconstruction_metrics(errors),
        "perplexity": usage.perplexity(),
        "codebook_usage": usage.usage(),
        "nominal_bits": sum(usage.nominal_bits()),
        "marginal_bits": sum(usage.marginal_bits()),
    }
    if tokenizer.has_posterior:
        values["mixture_RMSE"] = mixture_error(tokenizer, stage, test, accelerator)
        values["bound_bits_per_dim"], _ = bound_bits_per_dim(
            tokenizer, stage.train_images, test, accelerator, BATCH
        )
    return values


@torch.no_grad()
def mixture_error(
    tokenizer: Tokenizer, stage: TokenizerStage, test: ImageDataset, accelerator: Accelerator
) -> float:
    """RMSE on [0, 1] as training sees it at its last step, of some test images."""
    temperature = stage.temperature(stage.config.training.total_steps - 1)
    seed_everything(0)
    tokenizer.train()
    items = chosen_items(len(test), NUM_MIXTURE_IMAGES)
    total = 0.0
    for start in range(0, len(items), BATCH):
        images = to_float(test.images_at(items[start : start + BATCH])).to(accelerator.device)
        reconstructions = tokenizer(images, temperature).reconstructions
        total += (images - reconstructions).square().sum().item()
    tokenizer.eval()
    return math.sqrt(total / len(items) / math.prod(image_shape(test))) / 2


def distance(
    tokenizer: Tokenizer,
    other: ImageDataset,
    test: ImageDataset,
    budget: Budget,
    folder: Path,
    config: ExtractorConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Fréchet distance of reconstructed from original test images, and its floor.

    The floor is the distance of as many other images, unseen in training, from the originals.
    """
    extractor = load_extractor(config).to(accelerator.device)
    count = min(budget.num_distance_images, len(test), len(other))
    items, other_items = chosen_items(len(test), count), chosen_items(len(other), count)

    def reconstructions(rows: np.ndarray) -> Tensor:
        images = to_float(test.images_at(items[rows])).to(accelerator.device)
        return to_uint8(tokenizer.reconstruct(images))

    path = folder / f"originals_{extractor.name}_{count}.safetensors"
    if not path.exists():  # the same for all cells
        originals = {
            "originals": lambda rows: test.images_at(items[rows]),
            "others": lambda rows: other.images_at(other_items[rows]),
        }
        features = {
            name: extract_features(extractor, images_of, count, accelerator, name, BATCH).features
            for name, images_of in originals.items()
        }
        replace_file(path, lambda temporary: save_file(features, temporary))
    known = load_file(path)
    decoded = extract_features(
        extractor, reconstructions, count, accelerator, "decoded", BATCH
    ).features
    name = metric_name("rFD", extractor.name)
    return {
        name: frechet_distance(decoded, known["originals"]),
        f"{name} floor": frechet_distance(known["others"], known["originals"]),
    }


def prior_code_length(config: TokenizerRunConfig, test: DataConfig, steps: int) -> float:
    """Bits per test image under a small prior trained over the cell's codes."""
    prior = PriorRunConfig(
        run_dir=config.run_dir,
        prior=PriorNetworkConfig(
            width=64, num_spatial_layers=2, num_depth_layers=1, num_heads=2, dropout=0.0
        ),
        training=TrainingConfig(
            total_steps=steps,
            batch_size=32,
            learning_rate=3e-3,
            seed=config.training.seed,
            validation_interval=steps,
            checkpoint_interval=max(steps // 2, 1),
            num_validation_images=2_000,
        ),
    )
    accelerator = make_accelerator(prior)
    images = load_images(test, "train"), load_images(test, "validation")
    train(prior_stage(prior, *images, accelerator), prior, accelerator)
    bits = read_metrics(prior.output_dir, "validation")["bits_per_image"][1][-1]
    return float(bits)
