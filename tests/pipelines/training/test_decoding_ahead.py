"""Training on images that worker processes decode: the order and the result need no state."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import TokenizerRunConfig
from pipelines.data.batches import BatchOrder
from pipelines.data_config import ReadingConfig
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.loading import loading
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.image_files import noise, save, truncate
from tests.tiny_runs import (
    CrashError,
    assert_same_run,
    crash,
    make_stage,
    tokenizer_run,
    train_with,
)
from tokenizer.storage.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number in range(30):
        save(folder / "images" / f"{number:02}.png", noise(40, 36, seed=number))
    return folder


def run_of(folder: Path, name: str, num_workers: int = 2, **training: Any) -> TokenizerRunConfig:
    config = tokenizer_run(folder / name, folder / "cache", **training)
    reading = ReadingConfig(num_workers=num_workers, crop_area=0.3, color_jitter=0.2)
    update = {"dataset": "files", "root": folder / "images", "reading": reading}
    data = config.data.model_copy(update=update)
    return config.model_copy(update={"data": data})


def batches(stage: TokenizerStage, steps: range) -> list[torch.Tensor]:
    order = BatchOrder(stage.num_items, 4, seed=9)
    return [task().images for task in loading(stage, order, steps, 2, CPU)]


def test_workers_or_none_give_the_same_micro_batches_from_any_step_on(folder: Path) -> None:
    stage, other = (make_stage(run_of(folder, "none", count)) for count in (2, 0))
    assert isinstance(stage, TokenizerStage)
    assert isinstance(other, TokenizerStage)
    ahead, alone, later = (
        batches(stage, range(3)),
        batches(other, range(3)),
        batches(stage, range(1, 3)),
    )
    assert all(map(torch.equal, ahead, alone))
    assert all(map(torch.equal, ahead[2:], later))
    items = BatchOrder(stage.num_items, 4, seed=9).scattered().at(2)[0]
    assert stage.encoded is not None
    expected = stage.encoded.training_images(items[1::2], 9, 2).images
    assert torch.equal(ahead[5], expected)


def test_a_resumed_run_equals_the_uninterrupted_run_whatever_the_workers(folder: Path) -> None:
    whole = run_of(folder, "whole", total_steps=5)
    train_tokenizer(whole)
    with pytest.raises(CrashError):
        train_with(run_of(folder, "broken", total_steps=5), 3, crash)
    train_tokenizer(run_of(folder, "broken", num_workers=1, total_steps=5))
    assert_same_run(whole.output_dir, folder / "broken" / "tokenizer")


def test_a_lost_worker_is_an_error_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(run_of(folder, "none", 1))
    assert isinstance(stage, TokenizerStage)
    assert stage.encoded is not None
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    monkeypatch.setattr(type(stage.encoded.store), "read", kill)
    with pytest.raises(InputError, match=r"^data\.reading\.num_workers: a worker process ended"):
        batches(stage, range(1))


def test_a_worker_says_in_one_line_what_stops_it(folder: Path) -> None:
    stage = make_stage(run_of(folder, "none"))
    assert isinstance(stage, TokenizerStage)
    truncate(folder / "images" / "07.png")
    with pytest.raises(InputError, match=r"07\.png is not a readable image") as raised:
        batches(stage, range(30))
    assert "\n" not in str(raised.value)
