"""One cell: trains it with the ordinary commands, then measures its reconstructions."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.judges import load_judges
from benchmarks.machine import origin
from benchmarks.sharp.cells import SIZES, Budget, Cell, Weights, recipe, run_config
from benchmarks.sharp.grid import grid_energy
from pipelines.config import DataConfig
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.data.sources import load_images
from pipelines.decoder_run import decoder_run
from pipelines.evaluation.distances import Comparison, extract_features
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.judges import check_extractor
from pipelines.evaluation.metrics import frechet_distance, reconstruction_metrics
from pipelines.evaluation.reconstruction import bound_bits_per_dim, measure_reconstruction
from pipelines.finetune_decoder import finetune_decoder
from pipelines.images import image_grid, save_png, to_float, to_uint8
from pipelines.processes import new_accelerator
from pipelines.run.log import read_metrics
from pipelines.train_tokenizer import train_tokenizer
from tokenizer import Tokenizer
from tokenizer.storage.files import replace_file

BATCH = 100
NUM_SHOWN = 8


def run_cell(cell: Cell, budget: Budget, data: DataConfig, weights: Weights, folder: Path) -> None:
    """Trains, measures, and leaves `result.json` and `pictures.png` in the cell's folder."""
    started = time.process_time()
    model = _train(cell, budget, data, weights, folder)
    seconds = time.process_time() - started
    own = folder / cell.name
    stage = own / ("decoder" if cell.is_tuned else "tokenizer")
    images_per_second = read_metrics(stage, "train")["images_per_second"][1]
    tokenizer = Tokenizer.from_pretrained(model).eval()
    numbers = _measure(tokenizer, cell, budget, data, weights, folder)
    result = {
        "cell": cell.name,
        **cell._asdict(),
        "judges": cell.judges,
        "steps": budget.tuning_steps if cell.is_tuned else budget.total_steps * cell.length,
        "batch_size": budget.tuning_batch_size if cell.is_tuned else budget.batch_size,
        "loss_networks": tokenizer.config.loss_networks,
        "cpu_seconds": seconds,
        "images_per_second": float(np.median(images_per_second)),
        "numbers": numbers,
        **origin(shlex.join(["python", "-m", "benchmarks.sharp", *map(_anywhere, sys.argv[1:])])),
    }
    text = json.dumps(result, indent=2) + "\n"
    replace_file(own / "result.json", lambda path: path.write_text(text))


def _anywhere(word: str) -> str:
    """A path as its last part, as results name it."""
    return Path(word).name if "/" in word else word


def _train(cell: Cell, budget: Budget, data: DataConfig, weights: Weights, folder: Path) -> Path:
    """Trains to the last step; gives the folder of the model."""
    config = run_config(cell, budget, data, weights, folder)
    if not cell.is_tuned:
        train_tokenizer(config)
        return config.output_dir / "model"
    # The tokenizer of the base, as if this run had trained it.
    base = folder / cell.base.name / "tokenizer"
    own = folder / cell.name / "tokenizer"
    if not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(base.resolve())
    tuning = decoder_run(folder / cell.name)
    steps = budget.tuning_steps
    update = {
        "recipe": recipe(cell, budget, weights),
        "training": tuning.training.model_copy(
            update={
                "total_steps": steps,
                "batch_size": budget.tuning_batch_size,
                "warmup_steps": min(100, steps // 10),
                "validation_interval": max(steps // 2, 1),
                "checkpoint_interval": max(steps // 4, 1),
            }
        ),
    }
    tuning = tuning.model_copy(update=update)
    finetune_decoder(tuning)
    return tuning.output_dir / "model"


def _measure(
    tokenizer: Tokenizer,
    cell: Cell,
    budget: Budget,
    data: DataConfig,
    weights: Weights,
    folder: Path,
) -> dict[str, Any]:
    accelerator = new_accelerator()
    tokenizer.to(accelerator.device)
    train, validation = load_images(data, "train"), load_images(data, "validation")
    items = chosen_items(len(validation), min(budget.num_images, len(validation)))
    errors, usage = measure_reconstruction(tokenizer, validation, items, accelerator, BATCH)
    bound, _ = bound_bits_per_dim(tokenizer, train, validation, accelerator, BATCH, 0)
    patch_size = tokenizer.config.networks.patch_size
    originals = validation.images_at(items[:256])

    def reconstructions(rows: np.ndarray) -> Tensor:
        given = to_float(validation.images_at(items[rows])).to(accelerator.device)
        return to_uint8(tokenizer.reconstruct(given)).cpu()

    decoded = reconstructions(np.arange(min(256, len(items))))
    save_png(image_grid(decoded[:NUM_SHOWN], NUM_SHOWN), folder / cell.name / "pictures.png")
    shown = folder / f"{cell.images}_originals.png"
    save_png(image_grid(originals[:NUM_SHOWN], NUM_SHOWN), shown)
    numbers: dict[str, Any] = {
        **reconstruction_metrics(errors),
        "perplexity": usage.perplexity(),
        "nominal_bits": sum(usage.nominal_bits()),
        "marginal_bits": sum(usage.marginal_bits()),
        "bound_bits_per_dim": bound,
        "grid_energy": grid_energy(decoded, patch_size) / grid_energy(originals, patch_size),
        "num_images": len(items),
    }
    for name, judge in load_judges(*weights, SIZES[cell.images]).items():
        if name not in cell.judges:
            continue
        judge.to(accelerator.device)
        check_extractor(judge, tokenizer)
        real, floor = _reference(judge, train, validation, items, accelerator, folder, cell)
        found = extract_features(judge, reconstructions, len(items), accelerator, name, BATCH)
        numbers[f"rFD-{name}"] = frechet_distance(found.features, real)
        numbers[f"rFD-{name} floor"] = floor
        numbers[f"rFD-{name} image_size"] = judge.protocol["image_size"]
    return numbers


def _reference(
    judge: FeatureExtractor,
    train: ImageDataset,
    validation: ImageDataset,
    items: np.ndarray,
    accelerator: Accelerator,
    folder: Path,
    cell: Cell,
) -> tuple[Tensor, float]:
    """Features of the originals, and their distance from as many training images; kept on disk."""
    path = folder / f"{cell.images}_{judge.name}_{len(items)}.safetensors"
    if not path.exists():
        others = chosen_items(len(train), len(items))
        chosen = {"real": (validation, items), "train": (train, others)}
        tensors = {}
        for name, (images, rows) in chosen.items():
            comparison = Comparison(judge, accelerator, BATCH, len(rows), 0)
            tensors[name] = comparison.features_of(images, rows, name).features[:]
        replace_file(path, lambda own: save_file(tensors, own))
    kept = load_file(path)
    return kept["real"], frechet_distance(kept["train"], kept["real"][: len(kept["train"])])
