"""One cell: trains it with the ordinary command, then measures what its codes cost and draw."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.machine import origin
from benchmarks.rate.cells import Budget, Cell, run_config, with_heads
from benchmarks.rate.rated import RatedNearestQuantizer
from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.data.sources import load_images
from pipelines.evaluation.metrics import (
    CodeUsage,
    ImageErrors,
    image_errors,
    reconstruction_metrics,
)
from pipelines.images import to_float, to_uint8
from pipelines.processes import new_accelerator, seed_everything
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.calibration import calibrate_code_prior
from pipelines.training.losses import Bound
from tokenizer import Tokenizer
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.files import replace_file

BATCH = 50


def run_cell(cell: Cell, budget: Budget, data: DataConfig, folder: Path, command: str) -> None:
    """Trains, fits the prior where it is missing, measures, and leaves `result.json`."""
    config = run_config(cell, budget, data, folder)
    images = load_images(data, "train"), load_images(data, "validation")
    times = [time.process_time()]
    train(config)
    times.append(time.process_time())
    tokenizer = fitted_tokenizer(config, budget, images[0])
    times.append(time.process_time())
    rows = measure(tokenizer, cell, budget, images[1])
    times.append(time.process_time())
    seconds = [round(end - start, 1) for start, end in itertools.pairwise(times)]
    result = {
        "cell": cell.name,
        "shape": cell.shape.name,
        "family": cell.shape.family,
        "codebook_size": cell.shape.codebook_size,
        "is_stochastic": cell.is_stochastic,
        "has_prior": cell.has_prior,
        "seed": cell.seed,
        "steps": budget.total_steps,
        "nominal_bits": cell.shape.nominal_bits,
        "num_images": budget.num_images,
        "processor_seconds": dict(zip(("training", "fit", "measuring"), seconds, strict=True)),
        "rows": rows,
        **origin(command),
    }
    text = json.dumps(result) + "\n"
    replace_file(config.run_dir / "result.json", lambda path: path.write_text(text))


def train(config: TokenizerRunConfig) -> None:
    """To the last step; baselines with a prior get their rate term."""
    is_rated = config.tokenizer.code_prior.width > 0 and not config.tokenizer.has_posterior
    if not is_rated:
        train_tokenizer(config)
        return
    loss = Bound(config.recipe, has_posterior=False)
    train_tokenizer(config, quantizer=RatedNearestQuantizer, loss=loss)


def fitted_tokenizer(config: TokenizerRunConfig, budget: Budget, images: ImageDataset) -> Tokenizer:
    """The trained tokenizer with a prior, its own or one fitted now to its hard codes.

    Heads see as many batches either way: those that are fitted now see hard codes alone.
    """
    seed = config.training.seed
    seed_everything(seed)
    tokenizer = Tokenizer(with_heads(config.tokenizer, budget))
    weights = load_file(config.output_dir / "model" / "model.safetensors")
    missing, unexpected = tokenizer.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("code_prior.") for name in missing), missing
    device = new_accelerator().device
    tokenizer.to(device).eval()
    if missing:
        steps = budget.total_steps + budget.calibration_steps
        calibrate_code_prior(tokenizer, images, steps, seed, device)
    return tokenizer


def measure(
    tokenizer: Tokenizer, cell: Cell, budget: Budget, images: ImageDataset
) -> list[dict[str, Any]]:
    """A row for each way to choose the codes of the same test images."""
    items = chosen_items(len(images), min(budget.num_images, len(images)))
    searches = [SearchConfig(rate_weight=weight) for weight in cell.rate_weights]
    return [row_of(tokenizer, images, items, search) for search in (NO_SEARCH, *searches)]


def row_of(
    tokenizer: Tokenizer, images: ImageDataset, items: np.ndarray, search: SearchConfig
) -> dict[str, Any]:
    """Errors, bits and use of codes."""
    _, *size = images.images_at(items[:1])[0].shape
    usage = CodeUsage(tokenizer.code_maps(*size))
    errors: list[Tensor] = []
    bits: list[Tensor] = []
    seconds = 0.0
    for start in range(0, len(items), BATCH):
        originals = images.images_at(items[start : start + BATCH])
        batch = to_float(originals).to(next(tokenizer.parameters()).device)
        watch = time.process_time()
        indices = tokenizer.encode(batch, search)
        seconds += time.process_time() - watch
        usage.update([group.cpu() for group in indices])
        bits.append(tokenizer.code_length(indices).cpu())
        drawn = to_uint8(tokenizer.decode(indices)).cpu()
        errors.append(torch.stack(image_errors(originals, drawn), 1))
    metrics = reconstruction_metrics(ImageErrors(*torch.cat(errors).unbind(1)))
    layer_bits = torch.cat(bits).mean(0).tolist()
    return {
        "encoding": "search" if search.is_on else "greedy",
        "rate_weight": search.rate_weight,
        "RMSE": metrics["RMSE"],
        "PSNR": metrics["PSNR"],
        "SSIM": metrics["SSIM"],
        "bits": sum(layer_bits),
        "layer_bits": _rounded(layer_bits, 2),
        "perplexity": _rounded(usage.perplexity(), 2),
        "usage": _rounded(usage.usage(), 4),
        "encoding_seconds": round(seconds / len(items), 5),
    }


def _rounded(values: Sequence[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]
