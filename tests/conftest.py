"""What all tests share: one thread, fixed seeds, hypothesis without a clock."""

import os
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:  # pytest reads this file before it can check the shapes in what it imports
    from pipelines.generation import ImageGenerationPipeline

torch.set_num_threads(1)
# No deadline: a shared machine is slow at times. The same examples in every run.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Trained runs, shared by the tests of training, generation, evaluation and the commands

# The same bits in every run are promised on a CPU only.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images of all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of the preset `tiny`, both stages; read it only."""
    from pipelines.train_prior import train_prior
    from pipelines.train_tokenizer import train_tokenizer
    from tests.tiny_runs import prior_run, tokenizer_run

    run_dir = tmp_path_factory.mktemp("tiny_run")
    train_tokenizer(tokenizer_run(run_dir, cache_dir))
    train_prior(prior_run(run_dir))
    return run_dir


@pytest.fixture(scope="session")
def pipeline(tiny_run: Path) -> "ImageGenerationPipeline":
    from pipelines.generation import ImageGenerationPipeline

    return ImageGenerationPipeline.from_pretrained(tiny_run)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts further processes, which find the slow imports done."""
    from tests.faults.jobs import context

    return context
