"""Numbers: nothing non-finite goes on or is saved, bf16 ends near fp32, seeds fix images."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines import ImageGenerationPipeline
from pipelines.config import TokenizerRunConfig
from pipelines.generation import SamplingConfig
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.faults.configuration import small_pipeline
from tests.faults.tally import Tally
from tokenizer.config import NetworkConfig
from tokenizer.storage.untrusted import parse_json

NUM_TRIALS = 110
PRECISION_STEPS = 400
LEARNED_RMSE = 0.24
"""More than this after training: nothing was learnt, and nothing compared."""
BF16_DISTANCE = 0.10
"""Relative distance of the last validation RMSE in bf16 from that in fp32."""
POISONS = ("term", "loss", "gradient", "weight")


class PoisonedGradient(torch.autograd.Function):
    """The identity, with a gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: float) -> Tensor:
        """The loss as it is."""
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient as it must not be."""
        return gradients[0] * ctx.value, None


class PoisonedStage(TokenizerStage):
    """A stage in which one number is not finite at one step."""

    poison = ""
    value = math.nan
    poisoned_step = 0
    """From 0."""
    step = 0

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Tensor, step: int) -> Loss:
        """The loss, perhaps with a poisoned term, value or gradient."""
        self.step = step
        loss = super().loss(name, modules, batch, step)
        if step != self.poisoned_step:
            return loss
        if self.poison == "term":
            return Loss(loss.minimized, {**loss.terms, "rmse": torch.tensor(self.value)})
        if self.poison == "loss":
            return Loss(loss.minimized * self.value, loss.terms)
        if self.poison == "gradient":
            poisoned: Tensor = PoisonedGradient.apply(loss.minimized, self.value)
            return Loss(poisoned, loss.terms)
        return loss

    @torch.no_grad()
    def after_step(self, accelerator: Accelerator) -> None:
        """Poisons a weight, perhaps, behind the back of loss and gradient."""
        super().after_step(accelerator)
        if self.poison == "weight" and self.step == self.poisoned_step:
            next(self.model.decoder.parameters()).flatten()[0] = self.value


def tiny_run(folder: Path, **training: Any) -> TokenizerRunConfig:
    """The preset `tiny` in a folder of its own."""
    base = TOKENIZER_PRESETS["tiny"]
    return base.model_copy(
        update={
            "run_dir": folder / "run",
            "data": base.data.model_copy(update={"cache_dir": folder / "cache"}),
            "training": base.training.model_copy(update=training),
        }
    )


def poisoned_run(generator: np.random.Generator, folder: Path) -> str:
    """What goes wrong when a number is not finite; nothing if all is as promised."""
    total = 6
    intervals = [int(own) for own in generator.integers(1, 8, size=3)]
    names = ("log_interval", "validation_interval", "checkpoint_interval")
    config = tiny_run(
        folder,
        total_steps=total,
        gradient_accumulation_steps=int(generator.integers(1, 3)),
        ema_decay=float(generator.integers(2)) * 0.9,
        **dict(zip(names, intervals, strict=True)),
    )
    poison = POISONS[int(generator.integers(len(POISONS)))]
    step = int(generator.integers(total))
    accelerator = make_accelerator(config)
    stage = PoisonedStage(config, accelerator)
    stage.poison, stage.poisoned_step = poison, step
    stage.value = [math.nan, math.inf, -math.inf][int(generator.integers(3))]
    told = {"term": "rmse", "loss": "minimized", "gradient": "gradient_norm"}
    wanted = rf"step {step + 1}: .*{told.get(poison)} is "
    if poison == "weight":  # seen where it is saved, or in the next step's loss
        wanted = rf"step ({step + 1}: \S*decoder\S* is not finite|{step + 2}: .*loss is )"
    try:
        train(stage, config, accelerator)
    except DivergenceError as error:
        message = str(error)
    else:
        return f"{poison} at step {step + 1} was not noticed"
    if not re.match(wanted, message):
        return f"{poison} at step {step + 1}: {message}"
    states = sorted((config.output_dir / "state").glob("step_*"))
    if (str(states[-1]) if states else "there is no checkpoint") not in message:
        return f"the last good checkpoint is not named: {message}"
    for path in config.output_dir.glob("**/*.safetensors"):
        if not all(bool(own.isfinite().all()) for own in load_file(path).values()):
            return f"{path.name} was saved with a number that is not finite"
    for line in (config.output_dir / "metrics.jsonl").read_bytes().splitlines():
        parse_json(line, "metrics.jsonl")  # which takes no NaN
    return ""


def same_images(generator: np.random.Generator, pipeline: ImageGenerationPipeline) -> str:
    """Whether batch size or number of processes changes the images of a seed."""
    count = int(generator.integers(2, 14))
    seed = int(generator.integers(2**62))
    sampling = SamplingConfig(
        temperature=float(generator.uniform(0.3, 2)), top_k=int(generator.integers(1, 7))
    )
    expected = torch.cat(list(pipeline.draw(range(count), None, seed, sampling, 64)))
    world, batch_size = (int(own) for own in generator.integers(1, 6, size=2))
    for rank in range(min(world, count)):
        drawn = pipeline.draw(range(rank, count, world), None, seed, sampling, batch_size)
        if not torch.equal(torch.cat(list(drawn)), expected[rank::world]):
            return f"seed {seed}: process {rank} of {world}, batch size {batch_size} differ"
    return ""


def last_rmse(precision: str, seed: int, folder: Path, num_steps: int) -> float:
    """Trains a narrow SQ-VAE-2 on `shapes`; the last validation's RMSE."""
    base = TOKENIZER_PRESETS["shapes32-sqvae2"]
    networks = NetworkConfig(patch_size=4, width=32, max_width=32, num_blocks=1)
    data = {"cache_dir": folder / "cache", "num_images": 2_000, "num_validation_images": 200}
    training = {
        "total_steps": num_steps,
        "batch_size": 16,
        "warmup_steps": 10,
        "ema_decay": 0.9,
        "precision": precision,
        "seed": seed,
        "log_interval": num_steps,
        "validation_interval": num_steps,
        "checkpoint_interval": num_steps,
    }
    config = base.model_copy(
        update={
            "run_dir": folder / precision,
            "tokenizer": base.tokenizer.model_copy(update={"networks": networks}),
            "data": base.data.model_copy(update=data),
            "training": base.training.model_copy(update=training),
        }
    )
    train_tokenizer(config)
    line = (config.output_dir / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(line)["RMSE"])


def precision_problem(seed: int, folder: Path, num_steps: int = PRECISION_STEPS) -> str:
    """Whether bf16 ends further from fp32 than is promised, or fp32 learns nothing."""
    single, half = (last_rmse(own, seed, folder, num_steps) for own in ("fp32", "bf16"))
    distance = abs(half / single - 1)
    if single > LEARNED_RMSE or distance > BF16_DISTANCE:
        return f"RMSE {single:.4f} in fp32, {half:.4f} in bf16, seed {seed}"
    return ""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Poisoned runs, generated images and pairs of runs in two precisions."""
    notes = []
    pipeline = small_pipeline()
    for number in range(num_trials):
        generator = np.random.default_rng([seed, number])
        own_folder = folder / "trial"
        if number % 11 == 10:
            problem = precision_problem(number, own_folder)
        elif number % 2:
            problem = same_images(generator, pipeline)
        else:
            problem = poisoned_run(generator, own_folder)
        if problem:
            notes.append(f"{number}: {problem}")
        shutil.rmtree(own_folder, ignore_errors=True)
    return Tally(num_trials, num_trials - len(notes), len(notes), notes)
