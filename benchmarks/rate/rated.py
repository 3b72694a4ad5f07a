"""The deterministic baselines with a rate term: codes that a prior takes for likely are cheaper."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.config import GroupConfig, NearestQuantizerConfig
from tokenizer.quantizers.base import full_precision
from tokenizer.quantizers.mixture import proximity
from tokenizer.quantizers.nearest import NearestQuantizer


class RatedNearestQuantizer(NearestQuantizer):
    """Nearest codes, and soft assignments through which a code length reaches the latents.

    The assignments are P(k) ∝ exp(-‖r - b_k‖² / 2v), v the mean squared distance per dimension of
    the batch from its nearest codes: the variance that makes the mixture of equal Gaussians around
    the codes most likely. What is drawn and what codebooks follow are the nearest codes, as before.
    """

    has_posterior: ClassVar[bool] = True

    def __init__(self, group: GroupConfig) -> None:
        super().__init__(group, NearestQuantizerConfig())

    def log_posterior(
        self, layer: int, residual: Float[Tensor, "positions dim"]
    ) -> Float[Tensor, "positions codes"]:
        """Logarithm of the assignments; no gradient reaches v, nor the codebooks."""
        with full_precision(residual.device):
            codebook, latents = self.codebook(layer), residual.float()
            scores = proximity(latents, codebook)  # -‖r - b‖² / 2 but for what all codes share
            with torch.no_grad():
                squares = latents.square().sum(1) - 2 * scores.amax(1)
                variance = (squares.mean() / latents.shape[1]).clamp_min(1e-12)
            return (scores / variance).log_softmax(1)
