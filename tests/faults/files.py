"""Compressed pictures: a damaged file gives an error or the exact picture, nothing else."""

import functools
from pathlib import Path

import numpy as np
import torch

from pipelines import ImageGenerationPipeline
from pipelines.coding.layout import MODELS
from pipelines.marginals import Marginals
from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tests.faults.checkpoints import LONGEST_MESSAGE
from tests.faults.damage import spoiled
from tokenizer import InputError, Tokenizer, hq_vae
from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.config import NetworkConfig

NUM_TRIALS = 1_000
PRIOR_SIDE = 16
"""Of pictures that the prior of stage two knows."""


@functools.cache
def small_pipeline() -> ImageGenerationPipeline:
    """An untrained tokenizer of three layers, with all that gives probabilities of its codes."""
    torch.manual_seed(0)
    networks = NetworkConfig(width=4, max_width=4, num_blocks=1)
    config = hq_vae((8, 4), (2, 1), 16, 3, networks=networks)
    tokenizer = Tokenizer(config.model_copy(update={"code_prior": CodePriorConfig(width=4)}))
    identity = tokenizer.identity_hash()
    prior = PriorConfig(
        network=PriorNetworkConfig(
            width=8, num_spatial_layers=1, num_depth_layers=1, num_heads=2, order="coarse_to_fine"
        ),
        code_maps=tokenizer.code_maps(PRIOR_SIDE, PRIOR_SIDE),
        tokenizer_hash=identity,
    )
    pipeline = ImageGenerationPipeline(tokenizer, Prior(prior))
    counts = ((9, *range(15)),) * 3
    pipeline.marginals = Marginals(
        counts=counts, tokenizer_hash=identity, images="none", num_images=1
    )
    return pipeline


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Damages a file of a picture of any size and reads it; each model in turn."""
    pipeline, model = small_pipeline(), MODELS[number % len(MODELS)]
    sides = (PRIOR_SIDE - 7, PRIOR_SIDE + 1) if model == "prior" else (1, 70)
    height, width = generator.integers(*sides, 2)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = pipeline.compress(pixels, model=model)
    changed = spoiled(content, generator)
    try:
        found = np.asarray(pipeline.decompress(changed, "np"))
    except InputError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or not message.isprintable():
            return f"not a printable line: {message[:200]!r}"
        return ""
    codes = pipeline.encode(padded(pixels), "original")
    # A file that was cut behind a part gives the picture of its layers.
    for num_layers in (3, 2, 1) if content.startswith(changed) else (3,):
        expected = np.asarray(pipeline.decode(codes, num_layers, output="np"))
        if np.array_equal(found, expected[:, :height, :width]):
            return ""
    return f"another picture of {height} by {width} from {changed[:64]!r} and so on"


def padded(pixels: np.ndarray) -> np.ndarray:
    """Mirrored to multiples of 8."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="reflect")
