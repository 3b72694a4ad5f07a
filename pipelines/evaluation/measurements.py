"""Reconstruction and generation, measured: each number with the protocol it was measured by."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from tqdm import tqdm

from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.evaluation.classifier import ClassifierExtractor
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput
from pipelines.evaluation.metrics import (
    check_num_images,
    frechet_distance,
    generation_metrics,
    metric_name,
    metric_settings,
    reconstruction_metrics,
)
from pipelines.evaluation.protocol import Protocol
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.generation import ImageGenerationPipeline, SamplingConfig
from pipelines.images import to_float, to_uint8
from pipelines.processes import gather_shares, own_share, sum_over_processes
from tokenizer import Tokenizer
from tokenizer.storage.configs import StrictConfig

NUM_BOUND_IMAGES = 1_000
"""Images for the evidence lower bound, and as many training images for its decoder variance."""

Results = dict[str, dict[str, Any]]
"""By metric name: value and protocol."""


class EvaluationConfig(StrictConfig):
    """What is compared."""

    num_images: PositiveInt = 10_000
    """Images on each side of a distance, at most as many as the data set has."""
    reference: Literal["train", "validation"] = "train"
    """The images that generated ones are compared with; the floor compares the other split."""
    sampling: SamplingConfig = SamplingConfig()
    seed: NonNegativeInt = 0
    """Of the generated images and of the choice of reference images."""
    batch_size: PositiveInt = 100
    """Images at a time."""


def extract_features(
    extractor: FeatureExtractor,
    images_of: Callable[[np.ndarray], UInt8[Tensor, "batch channels height width"]],
    count: int,
    accelerator: Accelerator,
    title: str,
    batch_size: int,
) -> FeatureOutput:
    """Features of images 0 to `count`, shared by all processes, on the CPU of each."""
    own_items = own_share(accelerator, count)
    outputs = []
    starts = range(0, len(own_items), batch_size)
    for start in tqdm(starts, title, disable=not accelerator.is_main_process, leave=False):
        images = images_of(own_items[start : start + batch_size])
        outputs.append(extractor(images.to(accelerator.device)))
    if not outputs:  # more processes than images
        outputs.append(extractor(images_of(np.arange(1)).to(accelerator.device)))
        outputs[0] = FeatureOutput(*(rows[:0] for rows in outputs[0]))
    columns = (torch.cat(rows) for rows in zip(*outputs, strict=True))
    return FeatureOutput(*(gather_shares(accelerator, rows, count) for rows in columns))


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    accelerator: Accelerator,
) -> Results:
    """Errors, code use, rates and the reconstruction distance on validation images.

    The floor of the distance is that of as many training images from the validation images.
    """
    count = min(config.num_images, len(validation))
    check_num_images(count, count)
    items = chosen_items(len(validation), count, config.seed)
    errors, usage = measure_reconstruction(
        tokenizer, validation, items, accelerator, config.batch_size
    )
    values: dict[str, Any] = dict(reconstruction_metrics(errors))
    values["perplexity"] = usage.perplexity()
    values["codebook_usage"] = usage.usage()
    values["nominal_bits"] = sum(usage.nominal_bits())
    values["marginal_bits"] = sum(usage.marginal_bits())
    if tokenizer.has_posterior:
        values["bound_bits_per_dim"] = bound_bits_per_dim(
            tokenizer, train, validation, config, accelerator
        )

    def originals(rows: np.ndarray) -> Tensor:
        return validation.images_at(items[rows])

    def reconstructions(rows: np.ndarray) -> Tensor:
        images = to_float(originals(rows)).to(accelerator.device)
        return to_uint8(tokenizer.reconstruct(images))

    floor_items = chosen_items(len(train), count, config.seed)
    original, decoded, floor = (
        extract_features(
            extractor, images_of, number, accelerator, title, config.batch_size
        ).features
        for images_of, number, title in (
            (originals, count, "originals"),
            (reconstructions, count, "reconstructions"),
            (lambda rows: train.images_at(floor_items[rows]), len(floor_items), "floor"),
        )
    )
    name = metric_name("rFD", extractor.name)
    values[name] = frechet_distance(decoded, original)
    values[f"{name} floor"] = frechet_distance(floor, original)
    protocol = Protocol(
        reference=validation.description,
        reference_hash=validation.fingerprint,
        num_reference_images=count,
        num_images=count,
        seed=config.seed,
        extractor=extractor.protocol,
        settings={
            "codes": "hard",
            "bound_images": NUM_BOUND_IMAGES,
            "floor": train.description,
            "floor_hash": train.fingerprint,
            "floor_images": len(floor_items),
        },
    )
    return protocol.attach(values)


def evaluate_generation(
    pipeline: ImageGenerationPipeline,
    train: ImageDataset,
    validation: ImageDataset,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    accelerator: Accelerator,
) -> Results:
    """FID, IS, KID, precision and recall of generated images, and the floor of the distance."""
    reference, other = train, validation
    if config.reference == "validation":
        reference, other = validation, train
    num_reference = min(config.num_images, len(reference))
    check_num_images(config.num_images, num_reference)
    reference_items = chosen_items(len(reference), num_reference, config.seed)
    num_other = min(config.num_images, len(other))
    other_items = chosen_items(len(other), num_other, config.seed)

    sampler = pipeline.sampler(config.sampling)
    labels = "classes in turn" if pipeline.prior.config.num_classes else "none"
    if pipeline.prior.config.has_custom_conditioner:
        labels = "those of the reference images"

    def generated(rows: np.ndarray) -> Tensor:
        condition = None
        if pipeline.prior.config.has_custom_conditioner:
            items = reference_items[rows % num_reference]
            condition = torch.from_numpy(reference.labels[items])
        settings = (config.seed, sampler, len(rows))
        return torch.cat(list(pipeline.draw(rows.tolist(), None, *settings, condition=condition)))

    fake, real, floor = (
        extract_features(extractor, images_of, count, accelerator, title, config.batch_size)
        for images_of, count, title in (
            (generated, config.num_images, "generated"),
            (lambda rows: reference.images_at(reference_items[rows]), num_reference, "reference"),
            (lambda rows: other.images_at(other_items[rows]), num_other, "floor"),
        )
    )
    values = generation_metrics(fake, real, extractor.name, config.seed)
    if isinstance(extractor, ClassifierExtractor) and pipeline.prior.config.num_classes:
        agreement = f"class agreement{extractor.suffix}"
        asked = torch.arange(config.num_images) % pipeline.prior.config.num_classes
        values[agreement] = _share_equal(fake.logits, asked)
        values[f"{agreement} of real images"] = _share_equal(
            floor.logits, torch.from_numpy(other.labels[other_items])
        )
    protocol = Protocol(
        reference=reference.description,
        reference_hash=reference.fingerprint,
        num_reference_images=num_reference,
        num_images=config.num_images,
        seed=config.seed,
        extractor=extractor.protocol,
        sampling=config.sampling.model_dump(mode="json"),
        settings={
            **metric_settings(config.num_images, num_reference, config.seed),
            "labels": labels,
            "tokenizer_hash": pipeline.tokenizer.content_hash(),
            "prior_hash": pipeline.prior.content_hash(),
        },
    )
    floor_protocol = protocol.model_copy(
        update={
            "num_images": num_other,
            "sampling": {},
            "settings": {
                "in_place_of_generated": other.description,
                "their_hash": other.fingerprint,
            },
        }
    )
    floor_name = metric_name("FD", extractor.name) + " floor"
    floor_value = frechet_distance(floor.features, real.features)
    return protocol.attach(values) | floor_protocol.attach({floor_name: floor_value})


def _share_equal(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def bound_bits_per_dim(
    tokenizer: Tokenizer,
    train: ImageDataset,
    validation: ImageDataset,
    config: EvaluationConfig,
    accelerator: Accelerator,
) -> float:
    """Bits per dimension on validation images, the decoder's variance taken from training ones."""
    generator = torch.Generator(accelerator.device)
    variance: float | None = None
    for dataset in (train, validation):
        count = min(NUM_BOUND_IMAGES, len(dataset))
        items = chosen_items(len(dataset), count, config.seed)
        sums = torch.zeros(2, dtype=torch.float64)
        own_rows = own_share(accelerator, count)
        for start in range(0, len(own_rows), config.batch_size):
            rows = own_rows[start : start + config.batch_size]
            generator.manual_seed(config.seed + int(rows[0]))
            images = to_float(dataset.images_at(items[rows])).to(accelerator.device)
            bound = tokenizer.evidence_lower_bound(images, variance, generator)
            row_sums = torch.stack([bound.squared_errors.sum(), bound.bits_per_dim.sum()])
            sums += row_sums.double().cpu()
        squared_error, bits = (sum_over_processes(accelerator, sums) / count).tolist()
        variance = squared_error / math.prod(image_shape(dataset))
    return float(bits)
