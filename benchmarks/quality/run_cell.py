"""One cell: trains it with the ordinary loop, measures it on the test images."""

import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.machine import commit, machine
from benchmarks.quality.budgets import Budget, run_config
from benchmarks.quality.cells import ABLATIONS, FAIR, STOCHASTIC, Ablation, Cell
from benchmarks.quality.peers import PeerQuantizer
from benchmarks.quality.variants import VariantQuantizer
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
from pipelines.training.losses import Bound, Loss
from pipelines.training.tokenizer_stage import LoadedImages, TokenizerStage
from prior.config import PriorNetworkConfig
from tokenizer import Tokenizer
from tokenizer.config import StochasticQuantizerConfig
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.files import replace_file

NUM_MIXTURE_IMAGES = 2_000
BATCH = 250


HARD_SHARE = 0.2
"""Share of the steps with nearest codes in the ablation `hard-phase`."""


class CellStage(TokenizerStage):
    """The ordinary stage with the cell's quantizer, and a clock."""

    def __init__(self, cell: Cell, config: TokenizerRunConfig, accelerator: Accelerator) -> None:
        self.ablation = ABLATIONS[cell.ablation] if cell.ablation else Ablation()
        super().__init__(config, accelerator, quantizer=_quantizer(cell, self.ablation))
        self.num_steps = 0
        self.seconds = 0.0
        self._started = 0.0

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Tensor, step: int) -> Loss:
        """The ordinary loss, changed as the ablation has it."""
        total_steps = self.config.training.total_steps
        for quantizer in self.model.quantizers:
            if isinstance(quantizer, VariantQuantizer):
                is_late = step >= (1 - HARD_SHARE) * total_steps
                quantizer.is_hard = self.ablation.variant == "hard-phase" and is_late
        loss = super().loss(name, modules, batch, step)
        if not self.ablation.warms_up_latents:
            return loss
        latents = loss.terms["quantization_error"] - loss.terms["posterior_entropy"]
        assert isinstance(self.objective, Bound)
        missing = self.objective.latent_weight * (1 - min(1.0, 2 * step / total_steps))
        return loss._replace(minimized=loss.minimized - missing * latents * (2 / batch[0].numel()))

    def images_per_second(self) -> float:
        """Of training; by the clock on the wall if an earlier process has trained to the end."""
        if self.num_steps:
            return self.num_steps * self.config.training.batch_size / self.seconds
        speeds = read_metrics(self.config.output_dir, "train")["images_per_second"][1]
        return float(statistics.median(speeds))

    def temperature(self, step: int) -> float:
        """The recipe's, or linear from the first step."""
        if not self.ablation.has_linear_temperature:
            return super().temperature(step)
        first, last = self.config.recipe.initial_temperature, self.config.recipe.final_temperature
        return first + (last - first) * step / max(self.config.training.total_steps - 1, 1)

    def prepare(self, batch: LoadedImages) -> Tensor:
        """The images; the clock of the step starts."""
        self._started = time.process_time()
        return super().prepare(batch)

    def after_step(self, accelerator: Accelerator) -> None:
        """The baselines' codebooks; the clock stops.

        Processor time, since cells run side by side; of a GPU see `images_per_second` in the
        run's metrics.
        """
        super().after_step(accelerator)
        self.seconds += time.process_time() - self._started
        self.num_steps += 1


def _quantizer(cell: Cell, ablation: Ablation) -> BuildQuantizer | None:
    if cell.method.peer is not None:
        return functools.partial(PeerQuantizer, peer=cell.method.peer)
    if ablation.variant is None:
        return None
    config = cell.method.quantizer
    assert isinstance(config, StochasticQuantizerConfig)
    changed = config.model_copy(update=dict(ablation.quantizer))
    return functools.partial(VariantQuantizer, config=changed, variant=ablation.variant)


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
