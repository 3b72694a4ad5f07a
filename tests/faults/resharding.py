"""A prior is trained by four processes, two and one in turn, each of which goes on with the last.

Four share the weights, in two pairs or all together, then two do, then one has them all. Each but
the last is cut off between two checkpoints. The weights in the end are those of one process that
nobody has disturbed, to rounding.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from pipelines.run.checkpoints import load_state
from pipelines.training.loop import make_accelerator, train
from tests import sharded_runs
from tests.faults.jobs import context, free_port, rank_environment
from tests.faults.runs import finished_run
from tests.tiny_runs import crash, make_stage, train_with

NUM_TRIALS = 6
INTERVAL = 4
"""Steps between checkpoints."""


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Takes a run through its numbers of processes."""
    trained = finished_run(folder, "tokenizer").run_dir
    run_dir, whole = folder / f"resharded_{number}", folder / "whole_prior"
    first, second = sorted(generator.choice(np.arange(INTERVAL + 1, sharded_runs.STEPS), 2, False))
    plan = [(4, ("fsdp", "hsdp")[number % 2], int(first)), (2, "fsdp", int(second)), (1, "ddp", -1)]
    if not (whole / "prior" / "model").exists():
        _together(whole, trained, [(1, "ddp", -1)])
    _together(run_dir, trained, plan)
    states = [load_state(own / "prior" / "state") for own in (run_dir, whole)]
    if None in states:
        return f"there is no checkpoint: {(run_dir / 'output_0.txt').read_text()[-500:]}"
    found, expected = (own.tensors for own in states if own is not None)
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            if not torch.allclose(found[part][name], tensor, rtol=1e-3, atol=1e-5):
                return f"{plan}: {part}.{name} differs from that of one process"
    return ""


def _together(run_dir: Path, trained: Path, plan: list[tuple[int, str, int]]) -> None:
    run_dir.mkdir()
    for world, parallel, dies_at in plan:
        port = free_port()
        arguments = (world, port, run_dir, trained, parallel, dies_at)
        processes = [
            context.Process(target=_train, args=(rank, *arguments)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def _train(
    rank: int, world: int, port: str, run_dir: Path, trained: Path, parallel: str, dies_at: int
) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, world, port) | {"LOCAL_WORLD_SIZE": str(min(world, 2))}
    with (run_dir / f"output_{rank}.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        config = sharded_runs.prior(
            run_dir, trained, parallel=parallel, checkpoint_interval=INTERVAL
        )
        try:
            if dies_at < 0:
                train(make_stage(config), config, make_accelerator(config))
            else:
                train_with(config, dies_at, crash)
        finally:
            sys.stderr.flush()
            os._exit(0)
