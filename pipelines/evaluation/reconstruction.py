"""How well a tokenizer reconstructs a data set, and how it uses its codes."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.command_configs import EvaluationConfig
from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.evaluation.distances import Comparison
from pipelines.evaluation.feature_shares import IN_MEMORY, FeatureStore
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.judges import check_extractor, trained_by
from pipelines.evaluation.metrics import (
    CodeUsage,
    ImageErrors,
    image_errors,
    reconstruction_metrics,
)
from pipelines.evaluation.protocol import Protocol, Results
from pipelines.evaluation.reference import Reference, SavedStatistics
from pipelines.images import to_float, to_uint8
from pipelines.processes import gather_shares, own_share, sum_over_processes
from tokenizer import Tokenizer
from tokenizer.objective import MIN_VARIANCE, BoundCodes
from tokenizer.search_config import NO_SEARCH, SearchConfig

NUM_BOUND_IMAGES = 1_000
"""Images for the evidence lower bound, and as many training images for its decoder variance."""
BOUND_POSTERIORS = {
    "posterior": "the quantizer's, one sample for an image",
    "nearest": "a point mass at the nearest codes",
}
"""By `BoundCodes`, the approximate posterior in words."""


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


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor | None,
    config: EvaluationConfig,
    accelerator: Accelerator,
    reference: Reference | None = None,
    store: FeatureStore = IN_MEMORY,
) -> Results:
    """Errors, code use, rates and the reconstruction distance on validation images.

    The floor of the distance is that of as many training images from the validation images.

    Args:
        tokenizer: what reconstructs.
        train: for the decoder's variance of the bound, and for the floor.
        validation: what is reconstructed.
        extractor: of the distance; None leaves it out.
        config: numbers and seed.
        accelerator: the processes that share the work.
        reference: images to reconstruct in place of `validation`, or statistics to compare with.
        store: where features and statistics of images are kept.

    Raises:
        InputError: the extractor is a part of the tokenizer.
    """
    check_extractor(extractor, tokenizer)
    images: ImageDataset = validation
    if reference is not None and not isinstance(reference, SavedStatistics):
        images = reference
    items = chosen_items(len(images), min(config.num_images, len(images)), config.seed)
    errors, usage = measure_reconstruction(
        tokenizer, images, items, accelerator, config.batch_size, config.search
    )
    values: dict[str, Any] = {
        **reconstruction_metrics(errors),
        "perplexity": usage.perplexity(),
        "codebook_usage": usage.usage(),
        "nominal_bits": sum(usage.nominal_bits()),
        "marginal_bits": sum(usage.marginal_bits()),
    }
    if usage.own_prior_bits is not None:
        values["own_prior_bits"] = sum(usage.own_prior_bits)
    protocol = _of_reconstructions(tokenizer, images, len(items), config)
    bound = _bound(tokenizer, train, images, protocol, config, accelerator)
    results = protocol.attach(values) | bound
    if extractor is None:
        return results

    def reconstructions(rows: np.ndarray) -> Tensor:
        originals = to_float(images.images_at(items[rows])).to(accelerator.device)
        return to_uint8(tokenizer.reconstruct(originals, config.search))

    comparison = Comparison(
        extractor, accelerator, config.batch_size, config.num_images, config.seed, store
    )
    identity: dict[str, Any] = {"tokenizer": tokenizer.content_hash(), "seed": config.seed}
    identity |= {"images": images.fingerprint, "search": config.search.model_dump(mode="json")}
    decoded = comparison.features(reconstructions, len(items), "reconstructions", identity)
    other = train if images is validation else None
    return results | comparison.compare("rFD", decoded, reference or images, other, protocol)


def _of_reconstructions(
    tokenizer: Tokenizer, images: ImageDataset, count: int, config: EvaluationConfig
) -> Protocol:
    fields = config.search.model_dump(exclude_none=True) if config.search.is_on else {}
    searched = {f"search.{name}": value for name, value in fields.items()}
    return Protocol(
        reference=images.description,
        reference_hash=images.fingerprint,
        num_reference_images=count,
        num_images=count,
        seed=config.seed,
        settings={"codes": "hard", **searched, **trained_by(tokenizer)},
    )


def _bound(
    tokenizer: Tokenizer,
    train: ImageDataset,
    images: ImageDataset,
    protocol: Protocol,
    config: EvaluationConfig,
    accelerator: Accelerator,
) -> Results:
    bound, codes = bound_bits_per_dim(
        tokenizer, train, images, accelerator, config.batch_size, config.seed
    )
    count = min(NUM_BOUND_IMAGES, len(images))
    settings = {
        "approximate_posterior": BOUND_POSTERIORS[codes],
        "variance_of": f"{min(NUM_BOUND_IMAGES, len(train))} of {train.description}",
    }
    update = {"num_images": count, "num_reference_images": count, "settings": settings}
    return protocol.model_copy(update=update).attach({"bound_bits_per_dim": bound})
