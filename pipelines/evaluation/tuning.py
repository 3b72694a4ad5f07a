"""The settings of sampling with the least distance from the training images."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from pipelines.command_configs import EvaluationConfig
from pipelines.data.conditions import Conditions
from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.evaluation.distances import Comparison
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.measurements import drawing, given_to
from pipelines.evaluation.metrics import MIN_IMAGES, frechet_distance, metric_name
from pipelines.generation import ImageGenerationPipeline
from pipelines.sampling_config import SamplingConfig
from pipelines.tuned_sampling import TunedSampling
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

GRID: Mapping[str, Sequence[float]] = {
    "temperature": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    "guidance_scale": (1.0, 1.5, 2.0, 3.0, 4.0),
    "top_p": (0.8, 0.9, 0.95, 1.0),
}
"""What is tried, one line after another; each from where all is as the prior has learned it."""


def search(
    distance: Callable[[tuple[float, ...]], float], grid: Mapping[str, Sequence[float]]
) -> tuple[float, ...]:
    """The point of the grid with the least distance that was met.

    From all ones along one axis after another, then among the neighbors on each.
    """
    best = (1.0,) * len(grid)
    for reach in (max(map(len, grid.values())), 1):
        for axis, values in enumerate(grid.values()):
            place = values.index(best[axis])
            near = values[max(place - reach, 0) : place + reach + 1]
            best = min(((*best[:axis], v, *best[axis + 1 :]) for v in near), key=distance)
    return best


def tune(
    pipeline: ImageGenerationPipeline,
    images: tuple[ImageDataset, ImageDataset],
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    accelerator: Accelerator,
    conditions: tuple[Conditions, Conditions] | None = None,
) -> TunedSampling:
    """Searches coordinate by coordinate, then once more among the neighbors of the best.

    Every setting draws by the same random numbers and conditions, so that their distances differ by
    less than those of other seeds.

    Args:
        pipeline: what generates.
        images: for training, with which those that are drawn are compared, and for validation.
        extractor: of the distances.
        config: numbers and seed.
        accelerator: the processes that share the work.
        conditions: of training and validation images, where they are not classes.

    Raises:
        InputError: too few images.
    """
    train, _ = images
    count = min(config.num_images, len(train))
    if count < MIN_IMAGES:
        raise InputError(f"num_images must be >= {MIN_IMAGES}, got {count} of {len(train)} images")
    config = config.model_copy(update={"num_images": count})
    given, which = given_to(pipeline, images, train, config, conditions)
    comparison = Comparison(extractor, accelerator, config.batch_size, count, config.seed)
    real = comparison.features_of(train, chosen_items(len(train), count, config.seed), "reference")
    distances: dict[tuple[float, ...], float] = {}
    name = metric_name("FD", extractor.name)

    def distance(setting: tuple[float, ...]) -> float:
        if setting not in distances:
            sampling = SamplingConfig.checked(**dict(zip(GRID, setting, strict=True)))
            draw = drawing(pipeline, sampling, given, config.seed)
            fake = comparison.features(draw, count, "generated")
            distances[setting] = frechet_distance(fake.features, real.features)
            words = (f"{key} {value:g}" for key, value in zip(GRID, setting, strict=True))
            logger.info("%s: %s %.4g", ", ".join(words), name, distances[setting])
        return distances[setting]

    can_be_guided = given is not None and pipeline.prior.conditioner.has_null
    best = search(distance, GRID if can_be_guided else {**GRID, "guidance_scale": (1.0,)})
    protocol: dict[str, Any] = {
        "metric": name,
        "value": distances[best],
        "value_before": distances[1.0, 1.0, 1.0],
        "num_settings": len(distances),
        "num_images": count,
        "seed": config.seed,
        "reference": train.description,
        "reference_hash": train.fingerprint,
        "labels": which,
        "extractor": extractor.protocol,
    }
    return _tuned(best, pipeline.prior.content_hash(), protocol)


def _tuned(setting: tuple[float, ...], prior_hash: str, protocol: dict[str, Any]) -> TunedSampling:
    found = dict(zip(GRID, setting, strict=True))
    return TunedSampling(
        temperature=found["temperature"],
        guidance_scale=found["guidance_scale"],
        top_p=None if found["top_p"] == 1 else found["top_p"],
        prior_hash=prior_hash,
        protocol=protocol,
    )
