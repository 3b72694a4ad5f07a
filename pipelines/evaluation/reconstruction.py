"""How well a tokenizer reconstructs a data set, and how it uses its codes."""

import math

import numpy as np
import torch
from accelerate import Accelerator

from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.evaluation.metrics import CodeUsage, ImageErrors, image_errors
from pipelines.images import to_float, to_uint8
from pipelines.processes import gather_shares, own_share, sum_over_processes
from tokenizer import Tokenizer
from tokenizer.objective import MIN_VARIANCE, BoundCodes
from tokenizer.search_config import NO_SEARCH, SearchConfig

NUM_BOUND_IMAGES = 1_000
"""Images for the evidence lower bound, and as many training images for its decoder variance."""


def measure_reconstruction(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    items: np.ndarray,
    accelerator: Accelerator,
    batch_size: int = 250,
    search: SearchConfig = NO_SEARCH,
) -> tuple[ImageErrors, CodeUsage]:
    """Errors of these images after 8-bit rounding, and the counts and bits of their hard codes.

    The work is shared by all processes; each gets the whole result.
    """
    _, height, width = image_shape(dataset)
    usage = CodeUsage(tokenizer.code_maps(height, width))
    own_items = items[own_share(accelerator, len(items))]
    columns, bits = [], torch.zeros(len(usage.counts), dtype=torch.float64)
    for start in range(0, len(own_items), batch_size):
        images = dataset.images_at(own_items[start : start + batch_size])
        indices = tokenizer.encode(to_float(images).to(accelerator.device), search)
        usage.update([layer.cpu() for layer in indices])
        if tokenizer.code_prior is not None:
            bits += tokenizer.code_length(indices).sum(0).cpu()
        errors = image_errors(images, to_uint8(tokenizer.decode(indices)).cpu())
        columns.append(torch.stack(errors, 1))
    rows = torch.cat(columns) if columns else torch.zeros(0, 3, dtype=torch.float64)
    usage.counts = [sum_over_processes(accelerator, counts) for counts in usage.counts]
    if tokenizer.code_prior is not None:
        usage.own_prior_bits = (sum_over_processes(accelerator, bits) / len(items)).tolist()
    return ImageErrors(*gather_shares(accelerator, rows, len(items)).unbind(1)), usage


def bound_bits_per_dim(
    tokenizer: Tokenizer,
    train: ImageDataset,
    images: ImageDataset,
    accelerator: Accelerator,
    batch_size: int,
    seed: int = 0,
) -> tuple[float, BoundCodes]:
    """The tightest exact bound, in bits per dimension, and the approximate posterior it is of.

    The decoder's variance is taken from training images. Every approximate posterior gives a
    bound of the same likelihood; of means over the same images the smallest counts.
    """
    kinds: tuple[BoundCodes, ...] = ("posterior", "nearest")
    means = {
        codes: _mean_bound(tokenizer, train, images, accelerator, batch_size, seed, codes)
        for codes in kinds[0 if tokenizer.has_posterior else 1 :]
    }
    tightest = min(means, key=lambda codes: means[codes])
    return means[tightest], tightest


def _mean_bound(
    tokenizer: Tokenizer,
    train: ImageDataset,
    images: ImageDataset,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
    codes: BoundCodes,
) -> float:
    generator = torch.Generator(accelerator.device)
    variance: float | None = None
    for dataset in (train, images):
        count = min(NUM_BOUND_IMAGES, len(dataset))
        items = chosen_items(len(dataset), count, seed)
        sums = torch.zeros(2, dtype=torch.float64)
        own_rows = own_share(accelerator, count)
        for start in range(0, len(own_rows), batch_size):
            rows = own_rows[start : start + batch_size]
            generator.manual_seed(seed + int(rows[0]))
            batch = to_float(dataset.images_at(items[rows])).to(accelerator.device)
            bound = tokenizer.evidence_lower_bound(batch, variance, generator, codes)
            row_sums = torch.stack([bound.squared_errors.sum(), bound.bits_per_dim.sum()])
            sums += row_sums.double().cpu()
        squared_error, bits = (sum_over_processes(accelerator, sums) / count).tolist()
        variance = max(squared_error / math.prod(image_shape(dataset)), MIN_VARIANCE)
    return float(bits)
