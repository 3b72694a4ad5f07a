"""Do images show what their captions say? Procedural shapes, on one thread in a few minutes.

    python -m benchmarks.captions

Writes folders of shapes with captions such as "a small red star left above" in metadata.csv, trains
both stages by the ordinary functions with a tiny encoder of characters, generates an image for each
caption of the validation images, and looks at color, size, shape and place. Writes
benchmarks/results/captions_cpu.json and a sheet of images.
"""

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from benchmarks.captioned_shapes import SIZE, attributes, caption, describe, write_folder
from benchmarks.machine import origin
from pipelines import ImageGenerationPipeline
from pipelines.condition_config import ConditionSourceConfig
from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.data.shapes import (
    CLASS_NAMES,
    ShapeFactors,
    draw_shapes,
    shape_factors,
    shape_labels,
)
from pipelines.images import image_grid, save_png, to_float, to_uint8
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from prior import PriorNetworkConfig
from tokenizer.builders import sq_vae_2

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
PRESET = "shapes32-sqvae2"
NUM_TRAINING, NUM_VALIDATION = 8_000, 400
TOKENIZER_STEPS, PRIOR_STEPS = 800, 2_000
LEARNING_RATE = 3e-3
GUIDANCE_SCALES = (1.0, 2.0, 3.0)
NUM_NEIGHBORS = 5


class CharacterEncoder:
    """A token per word: the sum of fixed random vectors of its characters at their places."""

    source = ""

    def __init__(self, dim: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(32, 128, dim, generator=generator)

    def content_hash(self) -> str:
        """SHA-256 of the vectors."""
        return hashlib.sha256(self.vectors.numpy().tobytes()).hexdigest()

    def __call__(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """Tokens of the words, and where there are some."""
        words = [text.split()[:max_tokens] or [""] for text in texts]
        tokens = torch.zeros(len(texts), max(map(len, words)), self.vectors.shape[-1])
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for row, own in enumerate(words):
            for place, word in enumerate(own):
                codes = [min(ord(character), 127) for character in word][:32]
                tokens[row, place] = self.vectors[range(len(codes)), codes].sum(0)
                mask[row, place] = True
        return tokens, mask


class Judge(NamedTuple):
    """Tells attributes by the hue of saturated pixels, and by the images with the nearest outline.

    Backgrounds are hardly saturated, fills are.
    """

    outlines: Float[Tensor, "images pixels"]
    shapes: list[str]
    factors: list[ShapeFactors]

    @classmethod
    def from_shapes(cls, number: int = 8_000) -> "Judge":
        """One that knows so many training images."""
        items = np.arange(number, dtype=np.int64)
        images = torch.from_numpy(draw_shapes(0, "train", items, SIZE, 3)).movedim(-1, 1)
        names = [CLASS_NAMES[label] for label in shape_labels(items)]
        return cls(_fill(images)[0].flatten(1), names, shape_factors(0, "train", items))

    def attributes(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> list[dict[str, str]]:
        """What is seen in images."""
        fill, hues = _fill(images)
        distances = torch.cdist(fill.flatten(1), self.outlines)
        found = []
        for hue, rows in zip(hues, distances.topk(NUM_NEIGHBORS, largest=False)[1], strict=True):
            shapes = [self.shapes[row] for row in rows.tolist()]
            shape = max(shapes, key=shapes.count)
            alike = [self.factors[row] for row in rows.tolist() if self.shapes[row] == shape]
            mean = ShapeFactors(*np.mean(alike, axis=0).tolist())._replace(hue=float(hue))
            found.append(attributes(shape, mean))
        return found


def _fill(
    images: UInt8[Tensor, "batch channels height width"],
) -> tuple[Float[Tensor, "batch height width"], Float[Tensor, " batch"]]:
    """How far each pixel belongs to the shape, and the hue of the shape."""
    colors = images.float() / 255
    most, least = colors.amax(1), colors.amin(1)
    fill = ((most - least) / most.clamp_min(1e-3)).clamp(0.2, 0.8) / 0.6 - 1 / 3
    mean = (colors * fill.unsqueeze(1)).sum((2, 3)) / fill.sum((1, 2)).clamp_min(1e-3).unsqueeze(1)
    red, green, blue = mean.unbind(1)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue) / (2 * torch.pi) % 1
    return fill, hue


def agreement(
    found: Sequence[Mapping[str, str]], wanted: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Share of images in which each attribute is as wanted, and in which all are."""
    shares = {
        name: float(
            np.mean([own[name] == other[name] for own, other in zip(found, wanted, strict=True)])
        )
        for name in wanted[0]
    }
    every = [dict(own) == dict(other) for own, other in zip(found, wanted, strict=True)]
    return {**shares, "all": float(np.mean(every))}


def run_configs(folder: Path) -> tuple[TokenizerRunConfig, PriorRunConfig]:
    """Both stages on the folders."""
    tokenizer, prior = TOKENIZER_PRESETS[PRESET], PRIOR_PRESETS[PRESET]
    data = DataConfig(
        dataset="folder",
        root=folder / "train",
        validation_root=folder / "validation",
        image_size=SIZE,
        cache_dir=folder / "cache",
    )
    often: dict[str, Any] = {"validation_interval": 500, "num_validation_images": NUM_VALIDATION}
    return (
        tokenizer.model_copy(
            update={
                "run_dir": folder / "run",
                "data": data,
                "tokenizer": sq_vae_2((8, 4), 64, 32, networks=tokenizer.tokenizer.networks),
                "training": TrainingConfig(
                    total_steps=TOKENIZER_STEPS, learning_rate=LEARNING_RATE, **often
                ),
            }
        ),
        prior.model_copy(
            update={
                "run_dir": folder / "run",
                "condition": ConditionSourceConfig(kind="text"),
                "prior": PriorNetworkConfig(
                    width=64, num_spatial_layers=4, num_depth_layers=2, num_heads=2, dropout=0.0
                ),
                "targets": "indices",
                "sampling_temperature": 0.8,
                "training": TrainingConfig(
                    total_steps=PRIOR_STEPS,
                    batch_size=32,
                    learning_rate=LEARNING_RATE,
                    weight_decay=0.05,
                    **often,
                ),
            }
        ),
    )


def measure(folder: Path) -> dict[str, Any]:
    """Trains in `folder`, where it goes on if it was stopped, and measures."""
    encoder, seconds = CharacterEncoder(), {}
    if not (folder / "validation" / "metadata.csv").exists():
        write_folder(folder / "train", "train", NUM_TRAINING)
        write_folder(folder / "validation", "validation", NUM_VALIDATION)
    tokenizer, prior = run_configs(folder)
    started = time.perf_counter()
    train_tokenizer(tokenizer)
    seconds["tokenizer"] = round(time.perf_counter() - started)
    started = time.perf_counter()
    train_prior(prior, text_encoder=encoder)
    seconds["prior"] = round(time.perf_counter() - started)

    pipeline = ImageGenerationPipeline.from_pretrained(folder / "run", text_encoder=encoder)
    judge, wanted = Judge.from_shapes(), describe("validation", NUM_VALIDATION)
    items = np.arange(NUM_VALIDATION, dtype=np.int64)
    real = torch.from_numpy(draw_shapes(0, "validation", items, SIZE, 3)).movedim(-1, 1)
    with torch.inference_mode():
        reconstructed = to_uint8(pipeline.tokenizer.reconstruct(to_float(real)))
    others = np.random.default_rng(0).permutation(NUM_VALIDATION).tolist()
    results = {
        "other captions": agreement([wanted[row] for row in others], wanted),
        "real images": agreement(judge.attributes(real), wanted),
        "reconstructions": agreement(judge.attributes(reconstructed), wanted),
    }
    texts = [caption(words) for words in wanted]
    for scale in GUIDANCE_SCALES:
        started = time.perf_counter()
        images = pipeline(
            len(texts),
            condition=texts,
            temperature=prior.sampling_temperature,
            guidance_scale=scale,
            output="tensor",
            progress=False,
        )
        assert isinstance(images, Tensor)
        seconds[f"samples, guidance {scale:g}"] = round(time.perf_counter() - started)
        results[f"samples, guidance {scale:g}"] = agreement(judge.attributes(images), wanted)
        if scale == GUIDANCE_SCALES[-1]:
            save_png(image_grid(images[:32], 8), RESULTS / "captions_cpu.png")
    return {
        **origin("python -m benchmarks.captions"),
        "threads": torch.get_num_threads(),
        "steps": {"tokenizer": TOKENIZER_STEPS, "prior": PRIOR_STEPS},
        "training_images": NUM_TRAINING,
        "temperature": prior.sampling_temperature,
        "num_images": len(texts),
        "captions": texts[:32],
        "seconds": seconds,
        "agreement": results,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/captions"))
    torch.set_num_threads(1)
    results = measure(parser.parse_args().run_dir)
    path = RESULTS / "captions_cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
