"""The door of data: images of a source that the package does not know."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.command_configs import EvaluateConfig, ExtractorConfig
from pipelines.evaluate import evaluate
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.loop import make_accelerator, train
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.tiny_runs import (
    CrashError,
    InterferingStage,
    assert_same_run,
    crash,
    prior_run,
    tokenizer_run,
)
from tokenizer.storage.errors import InputError


@dataclasses.dataclass(frozen=True)
class Waves:
    """Images computed whenever they are asked for: horizontal and vertical waves."""

    num_items: int
    phase: float = 0.0
    side: int = 16
    class_names: tuple[str, ...] = ("horizontal", "vertical")

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.num_items) % 2

    @property
    def fingerprint(self) -> str:
        return f"{self}"

    @property
    def description(self) -> str:
        return f"{self.num_items} waves"

    def __len__(self) -> int:
        return self.num_items

    def images_at(self, item_indices: np.ndarray) -> torch.Tensor:
        items = torch.from_numpy(item_indices).view(-1, 1, 1)
        x = torch.arange(self.side).expand(len(items), self.side, self.side)
        wave = torch.sin(torch.where(items % 2 == 0, x.mT, x) * (1 + items % 7) / 4 + self.phase)
        return (127.5 + 127 * wave).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)


IMAGES = (Waves(40), Waves(32, phase=1.0))


def test_both_stages_train_on_it_resume_and_are_measured(tmp_path: Path) -> None:
    runs = [tokenizer_run(tmp_path / name, tmp_path / "cache") for name in ("whole", "resumed")]
    stage: Any = InterferingStage(
        TokenizerStage(runs[1], make_accelerator(runs[1]), IMAGES), 3, crash
    )
    with pytest.raises(CrashError):
        train(stage, runs[1], make_accelerator(runs[1]))
    for run in runs:
        train_tokenizer(run, IMAGES)
    assert_same_run(runs[1].output_dir, runs[0].output_dir)
    prior = prior_run(tmp_path / "whole")
    train_prior(prior, IMAGES)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    extractor = ExtractorConfig(
        kind="timm", model="test_resnet", weights=tmp_path / "resnet.safetensors", image_size=32
    )
    config = EvaluateConfig(run_dir=tmp_path / "whole", num_images=30, extractor=extractor)
    results = evaluate(config, IMAGES)
    protocol = results["reconstruction"]["RMSE"]["protocol"]
    assert protocol["reference"] == "32 waves"
    assert protocol["reference_hash"] == IMAGES[1].fingerprint
    assert 0 < results["generation"]["FD-test_resnet"]["value"] < float("inf")
    assert not (tmp_path / "cache").exists()

    other = (dataclasses.replace(IMAGES[0], phase=0.5), IMAGES[1])
    stages: Any = ((train_tokenizer, runs[0]), (train_prior, prior), (evaluate, config))
    for stage_of, its_config in stages:
        with pytest.raises(InputError, match="was trained with other training images"):
            stage_of(its_config, other)


def test_images_of_another_shape_than_the_config_says_are_refused(tmp_path: Path) -> None:
    images = (Waves(40, side=24), Waves(32))
    with pytest.raises(InputError, match=r"^data.channels and data.image_size must be those of 40"):
        train_tokenizer(tokenizer_run(tmp_path, tmp_path / "cache"), images)
