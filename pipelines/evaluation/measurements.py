"""Generated images and sets of images, measured: each number with its protocol."""

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
from pipelines.evaluation.metrics import check_num_images
from pipelines.evaluation.protocol import Protocol, Results
from pipelines.evaluation.reference import Reference, SavedStatistics
from pipelines.evaluation.rows import Rows, blocks
from pipelines.generation import ImageGenerationPipeline
from pipelines.sampling_config import SamplingConfig
from pipelines.tuned_sampling import filled, uses_tuned
from prior import Tokens


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
    identity = {
        "tokenizer": pipeline.tokenizer.content_hash(),
        "prior": pipeline.prior.content_hash(),
        "sampling": sampling.model_dump(mode="json"),
        "given": given_hash(labels),
        "seed": config.seed,
    }
    fake = comparison.features(draw, config.num_images, "generated", identity)
    protocol = _of_generation(pipeline, reference, extractor, config, sampling, which)
    results = comparison.compare("FD", fake, reference, other, protocol)
    if isinstance(extractor, ClassifierExtractor) and pipeline.prior.config.num_classes:
        assert isinstance(labels, Tensor)
        results |= _class_agreement(comparison, fake.logits, labels, validation, protocol)
    return results


def _of_generation(
    pipeline: ImageGenerationPipeline,
    reference: Reference,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    labels: str,
) -> Protocol:
    described: dict[str, Any] = sampling.model_dump(mode="json")
    if pipeline.tuned is not None and uses_tuned(config.sampling):
        described["tuned"] = pipeline.tuned.protocol
    return Protocol(
        reference=reference.description,
        reference_hash=reference.fingerprint,
        num_reference_images=None,
        num_images=config.num_images,
        seed=config.seed,
        extractor=extractor.protocol,
        sampling=described,
        settings={
            "labels": labels,
            "tokenizer_hash": pipeline.tokenizer.content_hash(),
            **trained_by(pipeline.tokenizer),
            "prior_hash": pipeline.prior.content_hash(),
        },
    )


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
