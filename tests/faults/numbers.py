"""Numbers: nothing that is not finite goes on, or is saved."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.training.divergence import DivergenceError
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from tests.tiny_runs import InterferingStage, make_stage, tokenizer_run
from tokenizer.storage.json_files import parse_json

NUM_TRIALS = 60
TERM = "reconstruction"
POISONS = ("term", "loss", "gradient", "weight")


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Trains with a term, a loss, a gradient or a weight that is not finite."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    total_steps = 6
    poison = POISONS[generator.integers(len(POISONS))]
    value = [math.nan, math.inf, -math.inf][generator.integers(3)]
    step = int(generator.integers(total_steps))  # from 0
    intervals = ("log_interval", "validation_interval", "checkpoint_interval")
    config = tokenizer_run(
        folder / "run",
        folder / "cache",
        total_steps=total_steps,
        gradient_accumulation_steps=int(generator.integers(1, 3)),
        ema_decay=float(generator.integers(2)) * 0.9,
        **{name: int(generator.integers(1, 8)) for name in intervals},
    )
    stage: Any = make_stage(config)
    parameter = next(stage.model.decoder.parameters())

    def spoil(weight: Tensor) -> None:
        weight.data.flatten()[0] = value  # behind the back of loss and gradient

    def interfere(loss: Loss) -> Loss:
        if poison == "term":
            return Loss(loss.minimized, {**loss.terms, TERM: torch.tensor(value)})
        if poison == "loss":
            return Loss(loss.minimized * value, loss.terms)
        if poison == "gradient":
            minimized = loss.minimized.clone()
            minimized.register_hook(lambda gradient: gradient * value)
            return Loss(minimized, loss.terms)
        parameter.register_post_accumulate_grad_hook(spoil)
        return loss

    names = {"term": TERM, "loss": "minimized", "gradient": "gradient_norm"}
    wanted = rf"step {step + 1}: .*{names.get(poison)} is "
    if poison == "weight":  # seen where it is saved, or in what comes next
        wanted = rf"step ({step + 1}|{step + 2}): .* is "
    stage = InterferingStage(stage, step, interfere)
    try:
        train(stage, config, make_accelerator(config))
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
