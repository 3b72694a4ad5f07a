"""What one training step takes on this machine, before there are data."""

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.training.losses import Bound
from prior import Prior, PriorConfig, PriorOutput
from tokenizer import Tokenizer

ComputeLoss = Callable[[], Tensor]

NUM_STEPS = 4
PATIENCE = 5.0
"""Seconds after which no further step is timed."""


def tokenizer_task(
    run: TokenizerRunConfig, num_images: int, device: torch.device
) -> tuple[nn.Module, ComputeLoss]:
    """A fresh tokenizer, and its loss on so many images of noise."""
    model = Tokenizer(run.tokenizer).to(device)
    size = run.data.image_size
    images = torch.rand(num_images, run.data.channels, size, size, device=device) * 2 - 1
    bound = Bound(run.recipe, model.has_posterior)
    return model, lambda: bound(images, model(images, 1.0)).minimized


def prior_task(
    run: PriorRunConfig, tokenizer_run: TokenizerRunConfig, num_images: int, device: torch.device
) -> tuple[nn.Module, ComputeLoss]:
    """A fresh prior, and its loss on the random codes of so many images."""
    size = tokenizer_run.data.image_size
    with torch.device("meta"):
        code_maps = Tokenizer(tokenizer_run.tokenizer).code_maps(size, size)
    model = Prior(PriorConfig(network=run.prior, code_maps=code_maps)).to(device)
    indices = [
        torch.stack(
            [
                torch.randint(num_codes, (num_images, group.height, group.width), device=device)
                for num_codes in group.codebook_sizes
            ],
            1,
        )
        for group in code_maps
    ]

    def loss() -> Tensor:
        output: PriorOutput = model(indices, None, None)
        return output.loss

    return model, loss


def seconds_per_step(
    model: nn.Module, loss: ComputeLoss, precision: Literal["fp32", "bf16"] = "fp32"
) -> float:
    """The fastest of some steps of AdamW; of fewer where they take long."""
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    seconds: list[float] = []
    while len(seconds) < NUM_STEPS and sum(seconds) < PATIENCE:
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        torch.autograd.backward(value)
        optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
