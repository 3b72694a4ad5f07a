"""Trains two networks against each other: `python -m ... RUN_DIR [STEP IN WHICH TO DIE]`.

The stage is what someone writes who adds a second network from outside the package.
"""

import math
import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus

from pipelines.command import run_command
from pipelines.config import RunConfig, TrainingConfig
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from pipelines.training.optimizer import Network
from pipelines.training.stage import Stage
from tests.tiny_runs import InterferingStage
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.pretrained import PretrainedModule


class GeneratorConfig(StrictConfig):
    noise: int = 4


class Generator(PretrainedModule[GeneratorConfig]):
    config_class = GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(config.noise, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


class AdversarialStage(Stage[Tensor, Tensor]):
    """Points on a circle."""

    num_items, sources, main_network = 64, {}, "generator"

    def __init__(self):
        torch.manual_seed(0)
        generator, discriminator = Generator(GeneratorConfig()), nn.Bilinear(2, 2, 1)
        self.networks = {
            "generator": Network(generator, lambda step: 0.01, ema_decay=0.9),
            "discriminator": Network(discriminator, lambda step: 0.04 / (step + 1)),
        }

    def load(self, items, is_flipped):
        angles = torch.from_numpy(items) * (2 * math.pi / self.num_items)
        return torch.stack([angles.cos(), angles.sin()], 1).float()

    def prepare(self, batch):
        return batch

    def loss(self, name, modules, batch, step):
        points = torch.cat([batch, modules["generator"](torch.randn(len(batch), 4))])
        real, generated = modules["discriminator"](points, points).chunk(2)
        if name == "generator":
            return Loss(softplus(-generated).mean(), {})
        return Loss((softplus(-real) + softplus(generated)).mean(), {"score": real.mean()})

    def validate(self, model, accelerator):
        return {"radius": model(torch.ones(1, 4)).norm().item()}

    def preview(self, model):
        return Image.new("L", (8, 8))


class AdversarialRun(RunConfig):
    training: TrainingConfig = TrainingConfig(
        total_steps=6,
        batch_size=8,
        gradient_accumulation_steps=2,
        log_interval=1,
        validation_interval=3,
        checkpoint_interval=2,
    )

    @property
    def output_dir(self) -> Path:
        return self.run_dir


def main() -> None:
    def die(loss: Loss) -> Loss:
        os.kill(os.getpid(), signal.SIGKILL)
        return loss

    config = AdversarialRun(run_dir=Path(sys.argv[1]))
    step = int(sys.argv[2]) if len(sys.argv) > 2 else -1
    accelerator = make_accelerator(config)
    train(InterferingStage(AdversarialStage(), step, die), config, accelerator)


if __name__ == "__main__":
    run_command(main)
