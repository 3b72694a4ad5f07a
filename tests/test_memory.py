"""Work under a limit on memory: with more data than fits, and with too little for a step."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.command import TRAINING_MEMORY
from pipelines.config import DataConfig
from pipelines.data.sources import load_images
from tests import workers
from tests.faults import memory
from tests.tiny_runs import assert_same_run

Limited = Callable[..., tuple[int, str]]

# Threads that decode take some megabytes each for their stack.
ROOM = (224 + 12 * min(32, os.cpu_count() or 1)) * 2**20
SIDE = memory.IMAGE_SIZE
NUM_IMAGES = ROOM // (2 * SIDE**2)  # of 3 · SIDE² bytes: half as much again as the room


@pytest.fixture
def limited(processes: ForkServerContext, tmp_path: Path) -> Limited:
    """Runs a command in a process of its own that may take `room` bytes more than it starts with.

    Gives its exit status and the line of its error.
    """

    def run(module: str, *arguments: object, room: int = ROOM) -> tuple[int, str]:
        output = tmp_path / "output.txt"
        process = processes.Process(
            target=workers.command,
            args=(module, [str(own) for own in arguments], output),
            kwargs={"room": room},
        )
        process.start()
        process.join()
        lines = output.read_text().splitlines()
        errors = [line for line in lines if line.startswith(("error: ", "Traceback"))]
        assert len(errors) <= 1, output.read_text()
        return process.exitcode or 0, "".join(errors)

    return run


# More data than fits


def read_into_memory(config: DataConfig, room: int, result: Any) -> None:
    """Whether the images fit into `room` bytes, which says that the limit is one."""
    images = load_images(config, "train").images
    memory.leave_room(room)
    try:
        result.put(len(np.array(images)))
    except MemoryError:
        result.put("too large")


@pytest.mark.slow
def test_more_data_than_fits_into_memory_is_cached_trained_on_and_measured(
    limited: Limited, processes: ForkServerContext, tmp_path: Path
) -> None:
    images = memory.write_folder(tmp_path, NUM_IMAGES)
    options = memory.data_options(images, tmp_path)
    assert limited("pipelines.train_tokenizer", "tiny", *options) == (0, "")
    extractor = memory.write_extractor(tmp_path)
    arguments = ["--what", "reconstruction", "--num-images", 40, *extractor]
    assert limited("pipelines.evaluate", tmp_path / "run", *arguments) == (0, "")
    config = DataConfig(
        dataset="folder",
        root=images,
        validation_share=0.01,
        image_size=SIDE,
        cache_dir=tmp_path / "cache",
    )
    results = multiprocessing.get_context("forkserver").Queue()
    process = processes.Process(target=read_into_memory, args=(config, ROOM, results))
    process.start()
    assert results.get(timeout=60) == "too large"
    process.join()


# Too little


@pytest.mark.parametrize(
    ("module", "arguments", "advice"),
    [
        ("train_tokenizer", ["tiny", "--training.batch-size", "50000"], TRAINING_MEMORY),
        ("generate", ["--num-images", "200000", "--batch-size", "200000"], "lower batch-size"),
        (
            "evaluate",
            ["--what", "generation", "--num-images", "50000", "--batch-size", "50000"],
            "lower batch-size",
        ),
    ],
)
def test_a_batch_that_does_not_fit_ends_in_one_line_that_says_what_to_lower(
    module: str,
    arguments: list[str],
    advice: str,
    limited: Limited,
    tiny_run: Path,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    places: dict[str, list[object]] = {
        "train_tokenizer": ["--run-dir", tmp_path / "run", "--data.cache-dir", cache_dir],
        "generate": [tiny_run, "--output-dir", tmp_path / "images"],
        "evaluate": [tiny_run, *memory.write_extractor(tmp_path)],
    }
    status, line = limited(f"pipelines.{module}", *arguments, *places[module])
    assert line.startswith("error: out of memory")
    assert advice in line
    assert status == 2


def train_starved(run_dir: Path, cache_dir: Path, step: int, output: Path) -> None:
    """Trains the preset `tiny` until memory runs out in the midst of `step`."""
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    folders = ["--run-dir", str(run_dir), "--data.cache-dir", str(cache_dir)]
    memory.train_starved([str(step), "tiny", *folders])


def test_a_run_without_memory_for_a_step_ends_in_one_line_and_goes_on_bit_by_bit(
    processes: ForkServerContext, limited: Limited, tiny_run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "errors.txt"
    process = processes.Process(target=train_starved, args=(tmp_path / "run", cache_dir, 3, output))
    process.start()
    process.join()
    assert process.exitcode == 2
    lines = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert lines == [f"error: out of memory (tried to allocate 16777216 bytes): {TRAINING_MEMORY}"]
    states = (tmp_path / "run" / "tokenizer" / "state").glob("step_*")
    assert max(path.name for path in states) == "step_00000002"
    folders = ["--run-dir", tmp_path / "run", "--data.cache-dir", cache_dir]
    assert limited("pipelines.train_tokenizer", "tiny", *folders) == (0, "")
    assert_same_run(tmp_path / "run" / "tokenizer", tiny_run / "tokenizer")
