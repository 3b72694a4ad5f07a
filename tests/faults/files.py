"""Compressed pictures: a damaged file gives an error or the exact picture, nothing else."""

import functools
from pathlib import Path

import numpy as np
import torch

from pipelines import TokenizerPipeline
from tests.faults.checkpoints import LONGEST_MESSAGE
from tests.faults.damage import spoiled
from tokenizer import InputError, Tokenizer, hq_vae
from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.config import NetworkConfig

NUM_TRIALS = 1_000


@functools.cache
def small_pipeline(width: int) -> TokenizerPipeline:
    """An untrained tokenizer of three layers, with a prior of its own where `width` > 0."""
    torch.manual_seed(0)
    networks = NetworkConfig(width=4, max_width=4, num_blocks=1)
    config = hq_vae((8, 4), (2, 1), 16, 3, networks=networks)
    prior = CodePriorConfig(width=width)
    return TokenizerPipeline(Tokenizer(config.model_copy(update={"code_prior": prior})))


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Damages a file of a picture of any size and reads it."""
    pipeline = small_pipeline(4 * (number % 2))
    height, width = generator.integers(1, 70, 2)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = pipeline.compress(pixels)
    changed = spoiled(content, generator)
    try:
        found = np.asarray(pipeline.decompress(changed, "np"))
    except InputError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or not message.isprintable():
            return f"not a printable line: {message[:200]!r}"
        return ""
    codes = pipeline.encode(padded(pixels))
    # A file that was cut behind a layer gives the picture of its layers.
    for num_layers in (3, 2, 1) if content.startswith(changed) else (3,):
        expected = np.asarray(pipeline.decode(codes, num_layers, output="np"))
        if np.array_equal(found, expected[:, :height, :width]):
            return ""
    return f"another picture of {height} by {width} from {changed!r}"


def padded(pixels: np.ndarray) -> np.ndarray:
    """Mirrored to multiples of 8."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="reflect")
