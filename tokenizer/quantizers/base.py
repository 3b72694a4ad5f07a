"""What all quantizers share."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Mode = Literal["mixture", "sample", "nearest"]
"""What stands for a latent: a Gumbel-softmax mixture of codes (training), one code drawn from the
posterior (evidence lower bound), or the nearest code (use)."""


class Draw(NamedTuple):
    """What stochastic quantization makes of N latents."""

    quantized: Float[Tensor, "positions dim"]
    indices: Int[Tensor, " positions"]
    """Chosen codes; of mixtures, the heaviest."""
    posterior_entropy: Float[Tensor, " positions"]
    """H(P) in nats; zero for the nearest code, which is a point mass."""


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast and TF32 off: in bf16 only 62 % of the nearest codes were found in a simulation."""
    allows_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allows_tf32


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


Collective = Callable[[Tensor], Tensor]
"""Combines a tensor over processes: its sum, or the main process's."""


class QuantizerOutput(NamedTuple):
    """One group after quantization.

    A NamedTuple, not a dataclass: Accelerate casts tuples back to float32 under mixed precision.
    """

    quantized: Float[Tensor, "batch dim height width"]
    """Sum of the layers' code vectors, or of their mixtures."""
    indices: Int[Tensor, "batch depth height width"]
    """Code indices; of mixtures, the heaviest code."""
    quantization_error: Float[Tensor, " batch"]
    """‖Ẑ - Σ_l Z_l‖² / (2 Σ_l s_l²), nats per image; zero for the baselines."""
    posterior_entropy: Float[Tensor, "batch depth"]
    """H(P_l), nats per image; zero for the nearest code, which is a point mass."""
    commitment: Float[Tensor, " batch"]
    """Baselines only: mean squared distance to the partial sums; otherwise zero."""


def random_rows(
    rows: Float[Tensor, "rows dim"], count: int, generator: torch.Generator | None = None
) -> Float[Tensor, "count dim"]:
    """`count` random rows, each at most once if there are enough; the generator is a CPU one."""
    device = "cpu" if generator is not None else rows.device
    if len(rows) >= count:
        chosen = torch.randperm(len(rows), generator=generator, device=device)[:count]
    else:
        chosen = torch.randint(len(rows), (count,), generator=generator, device=device)
    return rows[chosen.to(rows.device)]
