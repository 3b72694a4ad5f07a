"""Runs of the preset `tiny`: their configs, ways to interrupt them, and what makes two equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.sources import trained_images
from pipelines.decoder_run import DecoderRunConfig
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.run.folder import load_run
from pipelines.train_prior import prior_stage
from pipelines.training.decoder_stage import DecoderStage
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from pipelines.training.prior_stage import PriorStage
from pipelines.training.tokenizer_stage import TokenizerStage

RunConfigs = TokenizerRunConfig | PriorRunConfig


def tokenizer_run(
    run_dir: Path, cache_dir: Path, preset: str = "tiny", **training: Any
) -> TokenizerRunConfig:
    base = TOKENIZER_PRESETS[preset]
    return base.model_copy(
        update={
            "run_dir": run_dir,
            "data": base.data.model_copy(update={"cache_dir": cache_dir}),
            "training": base.training.model_copy(update=training),
        }
    )


def prior_run(run_dir: Path, **training: Any) -> PriorRunConfig:
    base = PRIOR_PRESETS["tiny"]
    return base.model_copy(
        update={"run_dir": run_dir, "training": base.training.model_copy(update=training)}
    )


def make_stage(config: RunConfigs) -> TokenizerStage | PriorStage:
    accelerator = make_accelerator(config)
    if isinstance(config, DecoderRunConfig):
        images = trained_images(config, config.tokenizer_dir, accelerator)
        return DecoderStage(config, accelerator, images)
    if isinstance(config, TokenizerRunConfig):
        return TokenizerStage(config, accelerator)
    run = load_run(TokenizerRunConfig, config.tokenizer_dir / "config.json")
    images = trained_images(run, config.tokenizer_dir, accelerator)
    return prior_stage(config, *images, accelerator)


class WrappedStage:
    """What a subclass does not define is the stage's.

    Taken over at once: from Python 3.12 on, a check of a protocol calls no `__getattr__`.
    """

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        for name in dir(stage):
            if not name.startswith("_") and not hasattr(type(self), name):
                setattr(self, name, getattr(stage, name))


class InterferingStage(WrappedStage):
    """A stage with something happening at the loss of one step."""

    def __init__(self, stage: Any, step: int, change: Callable[[Loss], Loss]) -> None:
        super().__init__(stage)
        self._step = step
        self._change = change

    def loss(self, name: str, modules: Any, batch: Any, step: int) -> Loss:
        loss = self._stage.loss(name, modules, batch, step)
        return self._change(loss) if step == self._step else loss


def train_with(config: RunConfigs, step: int, change: Callable[[Loss], Loss]) -> None:
    """Trains `config`, but `change` gets the loss of `step`, which counts from 0."""
    stage: Any = InterferingStage(make_stage(config), step, change)
    train(stage, config, make_accelerator(config))


class CrashError(Exception):
    """Stands for any sudden end."""


def crash(loss: Loss) -> Loss:
    raise CrashError


def logged(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "images_per_second"} for line in lines]


def weight_files(folder: Path) -> dict[str, bytes]:
    """All weights that training leaves behind: last state and model, by path.

    Without state.json, which holds the hash of what depends on the clock.
    """
    newest = sorted(folder.glob("state/step_*"))[-1:]
    paths = [*(path for own in newest for path in own.glob("*.safe*")), *folder.glob("model/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, moving average, optimizer and metrics, bit for bit."""
    assert weight_files(one).keys() == weight_files(other).keys()
    assert weight_files(one) == weight_files(other)
    assert logged(one) == logged(other)


def first_gradients(folder: Path) -> dict[str, Any]:
    """Gradients of a run of one step: AdamW's first moment is a tenth of them."""
    return {
        f"{path.stem}.{name}": 10 * tensor
        for path in folder.glob("state/*/*_optimizer.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith("exp_avg")
    }
