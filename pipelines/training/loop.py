"""The one training loop, shared by all stages.

All that depends on progress is a function of the step: the learning rates, the data order and the
random numbers. A checkpoint therefore holds only weights, optimizers and step, and a resumed run
repeats the uninterrupted one bit by bit on a CPU. To resume, run the same command again.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from pipelines.config import RunConfig, TrainingConfig
from pipelines.data.batches import BatchOrder
from pipelines.images import save_png
from pipelines.prefetch import one_ahead
from pipelines.processes import CommonInputError, new_accelerator, seed_everything, together
from pipelines.run.checkpoints import Tensors, check_sources, load_state
from pipelines.run.folder import locked, write_run_config
from pipelines.run.log import Metrics, RunLog
from pipelines.training.divergence import NonFiniteWatch
from pipelines.training.loading import loading, to_device
from pipelines.training.losses.base import Loss
from pipelines.training.networks import TrainedNetwork, saved_networks, without_gradient
from pipelines.training.optimizer import Network
from pipelines.training.progress import Progress
from pipelines.training.saving import Saver
from pipelines.training.sharding import is_sharding, machine_size, sharding
from pipelines.training.stage import BatchT, LoadedT, Stage
from pipelines.training.stopping import noted_signals
from tokenizer.storage.errors import InputError


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
    machine_size(accelerator, config)  # refuses what cannot be
    if config.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError("training.compile must be False: torch.compile finds no C++ compiler")
    num_parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % num_parts:
        raise CommonInputError(
            f"training.batch_size must be a multiple of {accelerator.num_processes} processes × "
            f"{config.gradient_accumulation_steps} accumulation steps, got {config.batch_size}"
        )
    return accelerator


def train(stage: Stage[Any, Any], run_config: RunConfig, accelerator: Accelerator) -> None:
    """Trains to the last step, going on from the last checkpoint if there is one.

    Raises:
        DivergenceError: a number is not finite; the last checkpoint stays.
        InputError: a damaged checkpoint, other data, or a folder that is in use.
        KeyboardInterrupt: the run was asked to stop; it is saved.
    """
    lock = locked(run_config.output_dir)
    with (
        lock if accelerator.is_main_process else contextlib.nullcontext(),
        sharding(accelerator, run_config.training),
    ):
        _train(_Run(stage, run_config, accelerator))


def _train(run: "_Run[Any, Any]") -> None:
    config = run.config
    steps = range(run.first_step, config.total_steps)
    with (
        noted_signals(run.accelerator) as stop,  # until all that follows is closed, too
        RunLog(run.output_dir, run.accelerator, run.first_step, run.saved_metrics) as log,
        run.progress() as progress,
        contextlib.closing(one_ahead(run.loading(steps))) as loaded,
        run.saver,
    ):
        if not steps:
            run.saver.repair_model()
        clock = _Clock(run.first_step)
        for step in steps:
            terms = run.train_step(step, loaded)
            finished = step + 1
            progress.note_step(finished)
            is_last = finished == config.total_steps
            if is_last:
                with run.main.in_use(is_changed=True) as model:
                    run.stage.finish(model)
            if run.saver.has_failed:
                stop.is_noted = True  # the others hear of it, and saving says why
            stops = stop.is_agreed()
            saves = finished % config.checkpoint_interval == 0 or is_last or stops
            logs = finished % config.log_interval == 0 or is_last
            validates = finished % config.validation_interval == 0 or is_last
            if logs or validates or saves:
                run.watch.check()
            if logs:
                speed = clock.steps_per_second(finished) * config.batch_size
                metrics = run.metrics(step, terms)
                log.write(finished, "train", {**metrics, "images_per_second": speed})
                loss = metrics[run.prefix(run.main) + "loss"]
                assert isinstance(loss, float)
                progress.tell(finished, loss, speed)
            if validates:
                log.write(finished, "validation", run.validate(finished))
                clock.restart(finished)
            if saves:
                run.saver.save(finished, log.flush())
            if stops:
                run.saver.wait()
                raise KeyboardInterrupt(
                    f"stopped and saved at step {finished}; run the same command to go on"
                )


class _Clock:
    """Measures the speed since it was last asked or restarted."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._started = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        previous, started = self._step, self._started
        self.restart(step)
        return (step - previous) / (self._started - started)


class _Run(Generic[LoadedT, BatchT]):
    """A stage under way; fresh, or as the last checkpoint left it."""

    def __init__(
        self, stage: Stage[LoadedT, BatchT], run_config: RunConfig, accelerator: Accelerator
    ) -> None:
        self.stage = stage
        self.config = config = run_config.training
        self.output_dir = run_config.output_dir
        self.accelerator = accelerator
        if accelerator.is_main_process:
            write_run_config(run_config)
        networks = stage.networks
        is_sharded = is_sharding(accelerator)
        folder, fallback = self.output_dir / "state", run_config.resume_from
        state = together(accelerator, lambda: load_state(folder, fallback, in_shards=is_sharded))
        if state is None:
            self.first_step, self.saved_metrics, saved = 0, "", None
            stage.initialize()
        else:
            self.first_step, self.saved_metrics = state.step, state.metrics
            check_sources(self.output_dir, state.sources, stage.sources)
            saved = saved_networks(state, networks, stage.main_network)
        shards = None if state is None else state.shards
        self.networks = [
            _trained(name, network, config, accelerator, saved, shards)
            for name, network in networks.items()
        ]
        (self.main,) = (network for network in self.networks if network.name == stage.main_network)
        self.watch = NonFiniteWatch(accelerator, self.output_dir)
        self.saver = Saver(
            accelerator, self.output_dir, self.networks, self.main, self.watch, stage.sources
        )

    def progress(self) -> Progress:
        """What the run tells people."""
        modules = [network.module for network in self.networks]
        count = sum(own.numel() for module in modules for own in module.parameters())
        what = (self.stage.description, self.stage.smaller_preset, count)
        return Progress(self.config, self.accelerator, self.first_step, *what)

    def prefix(self, network: TrainedNetwork) -> str:
        """Of the names of what is logged of a network; none where it is the only one."""
        return "" if len(self.networks) == 1 else f"{network.name}/"

    def loading(self, steps: range) -> Iterator[Callable[[], LoadedT]]:
        """Tasks that load the micro-batches of this process."""
        config, accelerator = self.config, self.accelerator
        order = BatchOrder(
            self.stage.num_items,
            config.batch_size,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            flip=True,
        )
        num_parts = config.gradient_accumulation_steps
        return loading(self.stage, order, steps, num_parts, accelerator.device)

    def train_step(self, step: int, loaded: Iterator[LoadedT]) -> dict[str, Tensor]:
        """One step of each network; gives the terms of the last micro-batch."""
        seed_everything(self.config.seed, self.accelerator.process_index, step)
        for network in self.networks:
            network.set_learning_rate(step)
        terms: dict[str, Tensor] = {}
        batches: Iterable[BatchT] = (
            self.stage.prepare(to_device(next(loaded), self.accelerator.device))
            for _ in range(self.config.gradient_accumulation_steps)
        )
        if self.stage.sees_whole_batch:
            batches = list(batches)
            modules = {network.name: network.prepared for network in self.networks}
            self.stage.before_step(modules, batches, step)
        for batch in batches:
            minimized: dict[str, Tensor] = {}
            with self.accelerator.accumulate(*(network.prepared for network in self.networks)):
                for network in self.networks:
                    prefix = self.prefix(network)
                    loss, norm = self._follow_gradient(network, batch, step)
                    minimized[f"{prefix}minimized"] = loss.minimized
                    named = {"loss": loss.minimized, **loss.terms, "gradient_norm": norm}
                    terms |= {f"{prefix}{name}": term.detach() for name, term in named.items()}
            self.watch.note(step + 1, {**terms, **minimized})
        self.stage.after_step(self.accelerator)
        for network in self.networks:
            network.update_ema(step + 1)
        return terms

    def _follow_gradient(
        self, network: TrainedNetwork, batch: BatchT, step: int
    ) -> tuple[Loss, Tensor]:
        others = [other for other in self.networks if other is not network]
        modules = {other.name: other.module for other in others} | {network.name: network.prepared}
        with without_gradient(others):
            loss = self.stage.loss(network.name, modules, batch, step)
            return loss, network.follow_gradient(loss.minimized)

    def metrics(self, step: int, terms: Mapping[str, Tensor]) -> Metrics:
        """What is logged of a step."""
        rates = {
            f"{self.prefix(network)}learning_rate": network.network.learning_rate(step)
            for network in self.networks
        }
        return {name: term.float().cpu().tolist() for name, term in terms.items()} | rates

    def validate(self, step: int) -> Metrics:
        """Metrics of the model in use, and its preview."""
        # Compiled code would be made once more, for other batches and without gradients.
        eager = torch.compiler.set_stance("force_eager" if self.config.compile else "default")
        with self.main.in_use() as used:
            was_training = used.training
            used.eval()
            with torch.no_grad(), self.accelerator.autocast(), eager:
                metrics = self.stage.validate(used, self.accelerator)
                if self.accelerator.is_main_process:
                    folder = self.output_dir / "samples"
                    folder.mkdir(exist_ok=True)
                    save_png(self.stage.preview(used), folder / f"step_{step:08d}.png")
            used.train(was_training)
        return metrics


def _trained(
    name: str,
    network: Network,
    config: TrainingConfig,
    accelerator: Accelerator,
    saved: Mapping[str, Tensors] | None,
    shards: Path | None,
) -> TrainedNetwork:
    if not is_sharding(accelerator):
        return TrainedNetwork(name, network, config, accelerator, saved)
    from pipelines.training.sharded_network import ShardedNetwork  # takes a second

    return ShardedNetwork(name, network, config, accelerator, saved, shards)
