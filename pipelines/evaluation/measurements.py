"""Reconstruction and generation, measured: each number with the protocol it was measured by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.command_configs import EvaluationConfig
from pipelines.data.conditions import Conditions
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.classifier import ClassifierExtractor
from pipelines.evaluation.conditions import given_hash, reference_conditions, reference_labels
from pipelines.evaluation.distances import Comparison
from pipelines.evaluation.feature_shares import IN_MEMORY, FeatureStore
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.judges import check_extractor, trained_by
from pipelines.evaluation.metrics import check_num_images, reconstruction_metrics
from pipelines.evaluation.protocol import Protocol, Results
from pipelines.evaluation.reconstruction import (
    NUM_BOUND_IMAGES,
    bound_bits_per_dim,
    measure_reconstruction,
)
from pipelines.evaluation.reference import Reference, SavedStatistics
from pipelines.evaluation.rows import Rows, blocks
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import to_float, to_uint8
from pipelines.sampling_config import SamplingConfig
from pipelines.tuned_sampling import filled, uses_tuned
from prior import Tokens
from tokenizer import Tokenizer


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


BOUND_POSTERIORS = {
    "posterior": "the quantizer's, one sample for an image",
    "nearest": "a point mass at the nearest codes",
}
"""By `BoundCodes`, the approximate posterior in words."""


def evaluate_generation(
    pipeline: ImageGenerationPipeline,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    accelerator: Accelerator,
    reference: Reference | None = None,
    conditions: tuple[Conditions, Conditions] | None = None,
    store: FeatureStore = IN_MEMORY,
) -> Results:
    """FID, IS, KID, precision and recall of generated images, and the floor of the distance.

    Args:
        pipeline: what generates.
        train: training images.
        validation: images of the same classes, which were not trained on.
        extractor: of the distances.
        config: what is compared.
        accelerator: the processes that share the work.
        reference: what the images are compared with; None: the split that `config` names.
        conditions: of training and validation images, where they are not classes.
        store: where features and statistics of images are kept.

    Raises:
        InputError: too few images, or the extractor is a part of the tokenizer.
    """
    check_extractor(extractor, pipeline.tokenizer)
    other: ImageDataset | None = None
    if reference is None:
        assert not isinstance(config.reference, Path), "the caller opens a folder"
        splits = (train, validation)
        reference, other = splits if config.reference == "train" else splits[::-1]
    is_saved = isinstance(reference, SavedStatistics)
    check_num_images(config.num_images, config.num_images if is_saved else len(reference))
    labels, which = given_to(pipeline, (train, validation), reference, config, conditions)
    sampling = filled(config.sampling, pipeline.tuned, labels is not None)
    comparison = Comparison(
        extractor, accelerator, config.batch_size, config.num_images, config.seed, store
    )
    draw = drawing(pipeline, sampling, labels, config.seed)
    described: dict[str, Any] = sampling.model_dump(mode="json")
    identity = {
        "tokenizer": pipeline.tokenizer.content_hash(),
        "prior": pipeline.prior.content_hash(),
        "sampling": dict(described),
        "given": given_hash(labels),
        "seed": config.seed,
    }
    fake = comparison.features(draw, config.num_images, "generated", identity)
    if pipeline.tuned is not None and uses_tuned(config.sampling):
        described["tuned"] = pipeline.tuned.protocol
    protocol = Protocol(
        reference=reference.description,
        reference_hash=reference.fingerprint,
        num_reference_images=None,
        num_images=config.num_images,
        seed=config.seed,
        extractor=extractor.protocol,
        sampling=described,
        settings={
            "labels": which,
            "tokenizer_hash": pipeline.tokenizer.content_hash(),
            **trained_by(pipeline.tokenizer),
            "prior_hash": pipeline.prior.content_hash(),
        },
    )
    results = comparison.compare("FD", fake, reference, other, protocol)
    if isinstance(extractor, ClassifierExtractor) and pipeline.prior.config.num_classes:
        assert isinstance(labels, Tensor)
        results |= _class_agreement(comparison, fake.logits, labels, validation, protocol)
    return results


def given_to(
    pipeline: ImageGenerationPipeline,
    splits: tuple[ImageDataset, ImageDataset],
    reference: Reference,
    config: EvaluationConfig,
    conditions: tuple[Conditions, Conditions] | None,
) -> tuple[Tensor | Tokens | None, str]:
    """Labels or conditions of the generated images, and which they are in words."""
    chosen_by = (config.labels, config.num_images, config.seed)
    if conditions is None:
        return reference_labels(pipeline.prior.config, splits[0], reference, *chosen_by)
    return reference_conditions(conditions, splits, reference, *chosen_by)


def drawing(
    pipeline: ImageGenerationPipeline,
    sampling: SamplingConfig,
    labels: Tensor | Tokens | None,
    seed: int,
) -> Callable[[np.ndarray], Tensor]:
    """What draws the images with some numbers, of which `labels` holds what is given to each."""
    sampler = pipeline.sampler(sampling, labels is not None)
    prior = pipeline.prior.config
    is_condition = prior.condition is not None or prior.has_custom_conditioner

    def draw(rows: np.ndarray) -> Tensor:
        chosen = None if labels is None else labels[torch.from_numpy(rows)]
        given: dict[str, Any] = {"condition" if is_condition else "labels": chosen}
        settings = {"seed": seed, "sampling": sampler, "batch_size": len(rows), **given}
        return torch.cat(list(pipeline.draw(rows.tolist(), **settings)))

    return draw


def _class_agreement(
    comparison: Comparison,
    logits: Rows,
    labels: Tensor,
    validation: ImageDataset,
    protocol: Protocol,
) -> Results:
    """Share of images whose class the extractor tells; beside it that of real images."""
    items = chosen_items(len(validation), comparison.num_images, comparison.seed)
    real = comparison.features_of(validation, items, "real images")
    correct = torch.from_numpy(validation.labels[items])
    results: Results = {}
    for whose, found, true in (("", logits, labels), (" of real images", real.logits, correct)):
        numbers = {"num_images": len(true), "num_reference_images": len(true)}
        told = torch.cat([rows.argmax(1) for rows in blocks(found)])
        share = (told == true).double().mean().item()
        name = f"class agreement{comparison.extractor.suffix}{whose}"
        results |= protocol.model_copy(update=numbers).attach({name: share})
    return results


def compare_sets(
    images: ImageDataset,
    reference: Reference,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    accelerator: Accelerator,
    store: FeatureStore = IN_MEMORY,
) -> Results:
    """FID, IS, KID, precision and recall of any images; the floor is of halves of the reference.

    Raises:
        InputError: too few images.
    """
    is_saved = isinstance(reference, SavedStatistics)
    items = chosen_items(len(images), config.num_images, config.seed)
    check_num_images(len(items), len(items) if is_saved else len(reference))
    comparison = Comparison(
        extractor, accelerator, config.batch_size, config.num_images, config.seed, store
    )
    features = comparison.features_of(images, items, "images")
    protocol = Protocol(
        reference=reference.description,
        reference_hash=reference.fingerprint,
        num_reference_images=None,
        num_images=len(items),
        seed=config.seed,
        settings={"images": images.description, "images_hash": images.fingerprint},
    )
    return comparison.compare("FD", features, reference, None, protocol)
