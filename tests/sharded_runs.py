"""Runs in shares: what one of several processes does, and what one process alone does."""

import contextlib
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pipelines.config import TokenizerRunConfig
from pipelines.recipe import AdversarialConfig
from pipelines.run import background
from pipelines.training import networks
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from tests.faults.jobs import rank_environment
from tests.tiny_runs import (
    CrashError,
    RunConfigs,
    WrappedStage,
    crash,
    make_stage,
    prior_run,
    tokenizer_run,
    train_with,
)

STEPS, BETWEEN = 20, 10
"""Of a run, and where it leaves its first checkpoint."""
DIES_AT = 13
ADVERSARIAL = AdversarialConfig(
    weight=0.1, start_step=2, lead_steps=2, width=8, num_downsamplings=2, augmentations=(),
    weighting="fixed",
)  # fmt: skip


def two_networks(run_dir: Path, cache_dir: Path, **training: Any) -> TokenizerRunConfig:
    """Stage one with a discriminator, without noise: the same for any number of processes."""
    config = tokenizer_run(run_dir, cache_dir, "tiny-baseline", **schedule(**training))
    quantizer = config.tokenizer.quantizer.model_copy(update={"restart_threshold": 0.0})
    tokenizer = config.tokenizer.model_copy(update={"quantizer": quantizer})
    recipe = config.recipe.model_copy(update={"adversarial": ADVERSARIAL})
    return config.model_copy(update={"tokenizer": tokenizer, "recipe": recipe})


def prior(run_dir: Path, trained: Path, **training: Any) -> RunConfigs:
    """Stage two, without dropout."""
    run_dir.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):  # another process was faster
        (run_dir / "tokenizer").symlink_to(trained / "tokenizer")
    config = prior_run(run_dir, **schedule(**training))
    network = config.prior.model_copy(update={"dropout": 0.0, "label_dropout": 0.0})
    return config.model_copy(update={"prior": network})


def schedule(**training: Any) -> dict[str, Any]:
    intervals = {"log_interval": 1, "validation_interval": STEPS, "checkpoint_interval": BETWEEN}
    return {"total_steps": STEPS, **intervals, **training}


class RecordingStage(WrappedStage):
    """Keeps what is minimized."""

    def __init__(self, stage: Any) -> None:
        super().__init__(stage)
        self.minimized: list[Tensor] = []

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Any, step: int) -> Loss:
        loss: Loss = self._stage.loss(name, modules, batch, step)
        self.minimized.append(loss.minimized.detach().clone())
        return loss


def losses(config: RunConfigs) -> Tensor:
    """Trains; the losses of all networks, step by step, as means over the processes."""
    stage: Any = RecordingStage(make_stage(config))
    accelerator = make_accelerator(config)
    train(stage, config, accelerator)
    minimized = torch.stack(stage.minimized)
    if accelerator.num_processes == 1:
        return minimized
    reduced: Tensor = accelerator.reduce(minimized, "mean")
    return reduced


def in_shares(
    rank: int, world: int, port: str, folder: Path, trained: Path, cache_dir: Path, parallel: str
) -> None:
    """One of several processes: trains both stages, interrupts a run and goes on with it."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, world, port)
    with (folder / f"output_{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # A process whose partner has died would wait for ever.
        threading.Timer(120, os._exit, [3]).start()
        try:
            found = {
                "two_networks": losses(two_networks(folder / "two", cache_dir, parallel=parallel)),
                "prior": losses(prior(folder / "prior", trained, parallel=parallel)),
            }
            # The rest with what is to change no number, or little.
            config = prior(
                folder / "killed", trained, parallel=parallel, activation_checkpointing=True
            )
            with pytest.raises(CrashError):
                train_with(config, DIES_AT, crash)
            train(make_stage(config), config, make_accelerator(config))
            networks.COMPILER = "aot_eager"  # in C++ it would take minutes
            can_compile = shutil.which("g++") is not None
            options = {"compile": can_compile, "activation_checkpointing": True}
            _ask_to_stop(rank, prior(folder / "asked", trained, parallel=parallel, **options))
            if can_compile:
                assert counters["stats"]["unique_graphs"] > 1
                assert not counters["graph_break"]
            options = {"precision": "bf16"}
            _fill_the_disk(rank, prior(folder / "full", trained, parallel=parallel, **options))
            torch.save(found, folder / f"losses_{rank}.pt")
        finally:
            sys.stderr.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def _ask_to_stop(rank: int, config: RunConfigs) -> None:
    """The last process alone gets SIGTERM in a step."""

    def ask(loss: Loss) -> Loss:
        if rank > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(KeyboardInterrupt, match=f"saved at step {DIES_AT + 1}"):
        train_with(config, DIES_AT, ask)
    assert (config.output_dir / "state" / f"step_{DIES_AT + 1:08d}").is_dir()


def _fill_the_disk(rank: int, config: RunConfigs) -> None:
    """From the second checkpoint on, the last process can write no file; in bf16."""
    background.PAUSE = 0.01
    stage = make_stage(config)
    accelerator = make_accelerator(config)
    computed: set[torch.dtype] = set()

    def note(block: nn.Module, _: Any) -> None:
        computed.update(own.dtype for own in block.parameters())

    class Filling(WrappedStage):
        def loss(self, name: str, modules: Any, batch: Any, step: int) -> Loss:
            if step == 0:
                assert {own.dtype for own in modules[name].parameters()} == {torch.float32}
                for block in modules[name].modules():
                    if type(block).__name__ in ("FSDPAttention", "FSDPFeedForward"):
                        block.register_forward_pre_hook(note)
            if step == DIES_AT and rank == accelerator.num_processes - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            loss: Loss = self._stage.loss(name, modules, batch, step)
            return loss

    with pytest.raises(OSError, match="File too large"):
        train(Filling(stage), config, accelerator)
    assert computed == {torch.bfloat16}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
