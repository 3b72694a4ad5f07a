"""The one training loop, shared by the tokenizer and the prior.

All that depends on progress is a function of the step: the rate, the data order and the random
numbers. A checkpoint therefore holds only weights, optimizer and step, and a resumed run repeats
the uninterrupted one bit by bit on a CPU. To resume, run the same command again.
"""

import contextlib
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.config import RunConfig, TrainingConfig
from pipelines.data.batches import BatchOrder
from pipelines.images import save_png
from pipelines.prefetch import one_ahead
from pipelines.processes import new_accelerator, seed_everything
from pipelines.run.checkpoints import (
    TrainingState,
    check_sources,
    load_state,
    optimizer_state,
    restore_optimizer,
    save_state,
)
from pipelines.run.folder import locked, write_run_config
from pipelines.run.log import Metrics, RunLog
from pipelines.training.divergence import NonFiniteWatch
from pipelines.training.loading import loading, to_device
from pipelines.training.losses.base import Loss
from pipelines.training.optimizer import make_optimizer, set_learning_rate
from pipelines.training.stopping import noted_signals
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule


@runtime_checkable
class Stage(Protocol):
    """What the loop has to know of the model that it trains."""

    num_items: int
    """Training items."""
    sources: dict[str, str]
    """Hashes of what the run learns from, by name; they must not change in its course."""

    @property
    def model(self) -> PretrainedModule[Any]:
        """What is trained."""

    def initialize(self) -> None:
        """Prepares fresh weights; called once, before the first step of a new run."""

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> Any:
        """What the host knows of these training items; runs in a thread of its own, one ahead."""

    def prepare(self, batch: Any) -> Any:
        """The micro-batch, from what was loaded and has been copied to the device."""

    def loss(self, model: nn.Module, batch: Any, step: int) -> Loss:
        """Calls the prepared model through its forward."""

    def after_step(self, accelerator: Accelerator) -> None:
        """What has to follow an optimizer step: the baselines' codebooks."""

    def rate_factors(self) -> dict[str, float]:
        """By name, learning rates in units of the run's; 1 where a parameter is not named."""

    def validate(self, model: nn.Module, accelerator: Accelerator) -> Metrics:
        """Metrics with hard codes over the validation items, the work shared by all processes."""

    def picture(self, model: nn.Module) -> Image.Image:
        """A grid for people; called on the main process alone."""


def make_accelerator(run_config: RunConfig) -> Accelerator:
    """The processes of a run.

    Raises:
        InputError: the batch cannot be shared equally, or there is nothing to compile with.
    """
    config = run_config.training
    # One process may train both stages, and their precision may differ.
    AcceleratorState._reset_state()
    accelerator = new_accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with="tensorboard",
        project_dir=run_config.output_dir,
        # Buffers are the same everywhere already, or (EMA codebooks) kept so by the stage.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError("training.compile must be False: torch.compile finds no C++ compiler")
    num_parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % num_parts:
        raise InputError(
            f"training.batch_size must be a multiple of {accelerator.num_processes} processes × "
            f"{config.gradient_accumulation_steps} accumulation steps, got {config.batch_size}"
        )
    return accelerator


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up, then constant, or a cosine that ends at zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(stage: Stage, run_config: RunConfig, accelerator: Accelerator) -> None:
    """Trains to the last step, going on from the last checkpoint if there is one.

    Raises:
        DivergenceError: a number is not finite; the last checkpoint stays.
        InputError: a damaged checkpoint, other data, or a folder that is in use.
        KeyboardInterrupt: the run was asked to stop; it is saved.
    """
    is_main = accelerator.is_main_process
    with locked(run_config.output_dir) if is_main else contextlib.nullcontext():
        _train(stage, run_config, accelerator)


def _train(stage: Stage, run_config: RunConfig, accelerator: Accelerator) -> None:
    config, output_dir = run_config.training, run_config.output_dir
    if accelerator.is_main_process:
        write_run_config(run_config)
    state = load_state(output_dir / "state", run_config.resume_from)
    if state is not None:
        check_sources(output_dir, state.sources, stage.sources)
    model = stage.model
    if state is None:
        stage.initialize()
    else:
        model.load_state_dict(state.model)
    model.to(accelerator.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    optimizer = make_optimizer(model, config, stage.rate_factors())
    first_step = 0
    if state is not None:
        first_step = state.step
        restore_optimizer(optimizer, state.optimizer)
        if ema is not None:
            ema.module.load_state_dict(state.ema)
    if config.compile:
        model.compile()
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    order = BatchOrder(
        stage.num_items,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        flip=True,
    )
    watch = NonFiniteWatch(accelerator, output_dir)
    run = _Run(stage, config, output_dir, accelerator, model, ema, optimizer, watch)
    bar = tqdm(
        total=config.total_steps * config.batch_size,
        initial=first_step * config.batch_size,
        unit="image",
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    steps = range(first_step, config.total_steps)
    tasks = loading(
        stage.load, order, steps, config.gradient_accumulation_steps, accelerator.device
    )
    with (
        noted_signals(accelerator) as stop,  # until all that follows is closed, too
        RunLog(output_dir, accelerator, first_step, state.metrics if state else "") as log,
        bar,
        contextlib.closing(one_ahead(tasks)) as loaded,
    ):
        started, logged_step = time.perf_counter(), first_step
        if not steps:  # the model for use may have been damaged, or removed, since
            run.save_model()
        for step in steps:
            seed_everything(config.seed, accelerator.process_index, step)
            rate = learning_rate(config, step)
            set_learning_rate(optimizer, rate)
            norm = torch.zeros((), device=accelerator.device)
            for _ in range(config.gradient_accumulation_steps):
                batch = stage.prepare(to_device(next(loaded), accelerator.device))
                with accelerator.accumulate(prepared):
                    loss = stage.loss(prepared, batch, step)
                    accelerator.backward(loss.minimized)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(
                            prepared.parameters(), config.max_gradient_norm
                        )
                    prepared_optimizer.step()
                    prepared_optimizer.zero_grad()
                numbers = {**loss.terms, "minimized": loss.minimized, "gradient_norm": norm}
                watch.note(step + 1, numbers)
            stage.after_step(accelerator)
            finished = step + 1
            if ema is not None:
                ema.update(model, step=finished)
            bar.update(config.batch_size)
            is_last = finished == config.total_steps
            stops = stop.is_agreed()
            saves = finished % config.checkpoint_interval == 0 or is_last or stops
            logs = finished % config.log_interval == 0 or is_last
            validates = finished % config.validation_interval == 0 or is_last
            if logs or validates or saves:
                watch.check()
            if logs:
                terms = _to_numbers(loss.terms)
                terms["gradient_norm"] = norm.item()
                now = time.perf_counter()
                speed = (finished - logged_step) * config.batch_size / (now - started)
                started, logged_step = now, finished
                extra = {"learning_rate": rate, "images_per_second": speed}
                log.write(finished, "train", {**terms, **extra})
                bar.set_postfix(loss=f"{terms['loss']:.4g}", refresh=False)
            if validates:
                log.write(finished, "validation", run.validate(finished))
                started, logged_step = time.perf_counter(), finished
            if saves:
                run.save(finished, log.flush())
            if stops:
                raise KeyboardInterrupt(
                    f"stopped and saved at step {finished}; run the same command to go on"
                )


class _Run(NamedTuple):
    """What validation and saving need."""

    stage: Stage
    config: TrainingConfig
    output_dir: Path
    accelerator: Accelerator
    model: PretrainedModule[Any]
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    watch: NonFiniteWatch

    @property
    def model_in_use(self) -> PretrainedModule[Any]:
        """The moving average, if the run keeps one."""
        return self.model if self.ema is None else self.ema.module

    def validate(self, step: int) -> Metrics:
        """Metrics of the model in use, and its picture."""
        used = self.model_in_use
        was_training = used.training
        used.eval()
        # Compiled code would be made once more, for other batches and without gradients.
        eager = torch.compiler.set_stance("force_eager" if self.config.compile else "default")
        with torch.no_grad(), self.accelerator.autocast(), eager:
            metrics = self.stage.validate(used, self.accelerator)
            if self.accelerator.is_main_process:
                folder = self.output_dir / "samples"
                folder.mkdir(exist_ok=True)
                save_png(self.stage.picture(used), folder / f"step_{step:08d}.png")
        used.train(was_training)
        return metrics

    def save(self, step: int, metrics_hash: str) -> None:
        """The state for resuming, and the model for use."""
        ema = {} if self.ema is None else self.ema.module.state_dict()
        moments = optimizer_state(self.optimizer)
        state = TrainingState(
            step, self.model.state_dict(), ema, moments, self.stage.sources, metrics_hash
        )
        self.watch.check_state(state)
        # The state last: a run that was killed in between saves the model once more.
        self.save_model()
        if self.accelerator.is_main_process:
            save_state(self.output_dir / "state", state)
        self.accelerator.wait_for_everyone()

    def save_model(self) -> None:
        """The model for use."""
        if self.accelerator.is_main_process:
            self.model_in_use.save_pretrained(self.output_dir / "model")


def _to_numbers(terms: dict[str, Tensor]) -> dict[str, float | list[float]]:
    return {name: term.detach().float().cpu().tolist() for name, term in terms.items()}
