"""The blocks of networks: what is compiled, recomputed or shared out on its own."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_CLASSES = frozenset({"Attention", "FeedForward", "ResidualBlock", "SelfAttention"})
"""Of x-transformers and of the tokenizer's stages, by name; none of them lies within another."""


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network that is not shared out yet."""
    return (own for own in module.modules() if type(own).__name__ in _CLASSES)


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Compiles each block in place; those of one kind and shape share the code.

    Names of weights stay. Copy the module before, not after.
    """
    found = [*blocks(module)]
    # Of one class each width and each resolution is other code; beyond the limit none is compiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(found))
    for block in found:
        block.forward = torch.compile(block.forward, backend=backend)


def recompute_blocks(module: nn.Module) -> None:
    """Has each block keep its inputs alone for the backward, which computes the rest once more.

    With the same random numbers, so that the gradient is the same bit for bit. After
    `compile_blocks`, if both are wanted.
    """
    for block in blocks(module):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
