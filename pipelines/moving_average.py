"""The moving average of a model's weights, which is saved for use."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.pretrained import PretrainedModule

WARMUP_POWER = 2 / 3


class MovingAverage:
    """A copy of a model that follows it, in evaluation mode.

    Early on it forgets faster: the decay after n updates is 1 - (n + 1)^(-2/3), up to `decay`.
    timm's `ModelEmaV3` gives the same bits, but walks through both models anew at each step.
    """

    def __init__(self, model: PretrainedModule[Any], decay: float) -> None:
        self.module = copy.deepcopy(model).eval()
        self.decay = decay
        # The parameters themselves, not a state dict: preparing a model for several processes
        # gives them other memory.
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after each optimizer step; `step` counts from 1."""
        decay = min(1 - step**-WARMUP_POWER, self.decay)
        own, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(own, theirs, 1 - decay)
        for mine, other in self._copied:
            mine.copy_(other)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
