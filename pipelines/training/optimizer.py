"""A network and the AdamW that trains it: weight decay, learning rates, and what it keeps."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config import TrainingConfig
from tokenizer.storage.pretrained import PretrainedModule


class Network(NamedTuple):
    """A network to train, and how."""

    module: nn.Module
    learning_rate: Callable[[int], float]
    """Of a step, counted from 0."""
    rate_factors: Mapping[str, float] = MappingProxyType({})
    """Learning rates of parameters by name, in units of `learning_rate`; 1 for all others."""
    weight_decay: float = 0.0
    """AdamW's; never applied to norms, biases and other vectors."""
    no_weight_decay: Collection[str] = frozenset()
    """Names of further parameters that it spares."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    max_gradient_norm: float = math.inf
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights; 0 = none."""
    apart: Collection[str] = frozenset()
    """Names of parameters in optimizer groups of their own, whose gradients are scaled down by
    their own norm: they do not change what the others learn."""
    added: Mapping[str, Tensor] = MappingProxyType({})
    """State by name that earlier versions did not save, as it was at their start."""

    @classmethod
    def from_config(
        cls,
        module: PretrainedModule[Any],
        config: TrainingConfig,
        rate_factors: Mapping[str, float] = MappingProxyType({}),
        apart: Collection[str] = frozenset(),
    ) -> "Network":
        """A model that is trained as the config of a run says."""
        return cls(
            module,
            config.learning_rate_at,
            rate_factors,
            config.weight_decay,
            module.no_weight_decay(),
            (0.9, config.beta2),
            config.max_gradient_norm,
            config.ema_decay,
            apart,
        )

    def clipped(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients share a norm: those apart last, if there are any."""
        parameters: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.module.named_parameters():
            parameters[name in self.apart].append(parameter)
        return [own for own in parameters if own]


class GroupKey(NamedTuple):
    """What the parameters of an optimizer group have in common."""

    weight_decay: float
    rate_factor: float
    is_apart: bool


def parameter_groups(
    network: Network, names: Iterable[str] | None = None
) -> dict[GroupKey, list[str]]:
    """Names of the trained parameters by optimizer group.

    Args:
        network: holds the parameters.
        names: of all of them, in the order to keep; None takes that of the module.
    """
    parameters = dict(network.module.named_parameters())
    groups: dict[GroupKey, list[str]] = {}
    for name in parameters if names is None else names:
        if parameters[name].requires_grad:
            decays = parameters[name].ndim > 1 and name not in network.no_weight_decay
            factor = network.rate_factors.get(name, 1.0)
            weight_decay = network.weight_decay if decays else 0.0
            key = GroupKey(weight_decay, factor, name in network.apart)
            groups.setdefault(key, []).append(name)
    return groups


def make_optimizer(network: Network) -> torch.optim.Optimizer:
    """AdamW over the groups, which knows its parameters by name."""
    parameters = dict(network.module.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [(name, parameters[name]) for name in names],
                "weight_decay": key.weight_decay,
                "rate_factor": key.rate_factor,
            }
            for key, names in parameter_groups(network).items()
        ],
        lr=network.learning_rate(0),
        betas=network.betas,
        fused=True,  # one kernel for all parameters
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each parameter its share of the learning rate at this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer from `make_optimizer` keeps: `PARAMETER.exp_avg` and the like."""
    return {
        f"{name}.{quantity}": tensor
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for quantity, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Fills an optimizer that was built alike with what `optimizer_tensors` gave."""
    groups = optimizer.state_dict()["param_groups"]
    numbers = {
        name: number
        for group in groups
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, quantity = key.rsplit(".", 1)
        state.setdefault(numbers[name], {})[quantity] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Files hold contiguous tensors; the fused kernel wants those of a weight laid out alike.
    for weight, kept in optimizer.state.items():
        for quantity, tensor in kept.items():
            if tensor.shape == weight.shape:
                kept[quantity] = torch.empty_like(weight).copy_(tensor)
