"""The interface of quantizers: latents to code indices and code vectors.

To add one: its config in `tokenizer/config.py`, a file beside this one with its class, a row in
`__init__.py`, and a builder in `tokenizer/builders.py`. Nobody else asks which quantizer it is.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenizer.config import GroupConfig
from tokenizer.storage.errors import InputError

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


class CrossEntropy(NamedTuple):
    """Σ_n CE(P_n, p_n) in nats, twice."""

    rate: Float[Tensor, ""]
    """CE(P, sg p): its gradient reaches the posteriors alone."""
    fit: Float[Tensor, ""]
    """CE(sg P, p): the same number, whose gradient reaches the prior alone."""


def plain_cross_entropy(
    log_posterior: Float[Tensor, "positions codes"], log_prior: Float[Tensor, "positions codes"]
) -> CrossEntropy:
    """With whole matrices: what the fast version must equal."""
    posterior = log_posterior.exp()
    return CrossEntropy(
        -(posterior * log_prior.detach()).sum(), -(posterior.detach() * log_prior).sum()
    )


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
    """Sum of the layers' code vectors, or of what stands for them in training."""
    indices: Int[Tensor, "batch depth height width"]
    """Code indices; of mixtures, the heaviest code."""
    posterior_entropy: Float[Tensor, "batch depth"]
    """H(P_l), nats per image; zero for a point mass."""
    latent_terms: Mapping[str, Float[Tensor, " batch"]]
    """What else the quantizer adds to the objective, per image, by the name to log it under.

    With a posterior in nats; without one squared distances per value, as a commitment is.
    """


class Quantizer(nn.Module, ABC):
    """The layers of one resolution group: each quantizes what the layers before it left over.

    Built from a `GroupConfig`, so that `num_layers` and the sizes of the codebooks are known.
    """

    has_posterior: ClassVar[bool] = False
    """Whether P(code | latents) is a distribution: then there is a bound, and soft targets."""

    def __init__(self, group: GroupConfig) -> None:
        super().__init__()
        self.num_layers = group.num_layers

    @abstractmethod
    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Code vectors of a layer."""

    @abstractmethod
    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantizes `latents`.

        In the mode "nearest", `quantized` is the sum of the code vectors of `indices`, to the
        last bit: decoding starts from these.
        """

    def initialize(
        self, latents: Float[Tensor, "batch dim height width"], generator: torch.Generator
    ) -> None:
        """Starts from encoder outputs, once, before the first step; nothing by default.

        Raises:
            InputError: it cannot start from these.
        """

    def after_step(self, total: Collective, from_main: Collective) -> None:
        """What has to follow an optimizer step, the same on all processes; nothing by default.

        Args:
            total: sums a tensor over all processes.
            from_main: gives every process the main process's tensor.
        """

    def variances(self) -> Float[Tensor, " layers"]:
        """s² of each layer; empty where there are none."""
        return torch.zeros(0)

    def learned_roles(self) -> dict[str, Literal["codebook", "variance"]]:
        """By name, parameters that weight decay spares and that learn at rates of their own."""
        return {}

    def log_posterior(
        self, layer: int, residual: Float[Tensor, "positions dim"]
    ) -> Float[Tensor, "positions codes"]:
        """Logarithm of P_l(k | residual).

        Raises:
            InputError: this quantizer has no posterior.
        """
        raise InputError(f"{type(self).__name__} has no posterior over its codes")

    def cross_entropy(
        self,
        layer: int,
        residual: Float[Tensor, "positions dim"],
        features: Float[Tensor, "positions width"],
        head: nn.Linear,
    ) -> CrossEntropy:
        """Σ CE(P_l, p) over the positions, where p = softmax(head(features)).

        Raises:
            InputError: this quantizer has no posterior.
        """
        log_prior = at_least_float32(head(features)).log_softmax(1)
        return plain_cross_entropy(self.log_posterior(layer, residual), log_prior)

    def log_posteriors(
        self,
        latents: Float[Tensor, "batch dim height width"],
        indices: Int[Tensor, "batch depth height width"],
    ) -> list[Float[Tensor, "batch height width codes"]]:
        """Logarithm of P_l(k | residual of layer l), given the codes of the layers before.

        Raises:
            InputError: this quantizer has no posterior.
        """
        raise InputError(f"{type(self).__name__} has no posterior over its codes")


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
