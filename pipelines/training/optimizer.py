"""AdamW, with the weight decay and the relative learning rate that each parameter wants."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2
from torch import nn

from pipelines.config import TrainingConfig
from tokenizer.storage.pretrained import PretrainedModule


def make_optimizer(
    model: PretrainedModule[Any],
    config: TrainingConfig,
    factors: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """Spares norms, biases and `no_weight_decay()`; `factors` are rates in units of the run's."""
    spared = model.no_weight_decay()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in spared
            key = (config.weight_decay if decays else 0.0, factors.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    return create_optimizer_v2(
        [
            {"params": parameters, "weight_decay": weight_decay, "rate_factor": factor}
            for (weight_decay, factor), parameters in groups.items()
        ],
        opt="adamw",
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=True,  # one kernel for all parameters
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each parameter its share of the run's rate at this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
