"""Completion where known codes come after drawn ones: a particle filter over candidates."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor


class Candidates:
    """Several completions of each image, weighed by how likely they make the known later codes.

    Codes are drawn in order, so that a draw does not see the known codes behind it. Sequential
    importance resampling (Gordon, Salmond and Smith 1993) mends that: a candidate's weight is the
    product of the probabilities of the known codes given what it drew before them; candidates are
    drawn anew by weight after a step where few of them have most of the weight, and one is drawn
    at the end. With more candidates the result approaches the conditional distribution.

    Rows are those of one image after another. An image without known codes behind drawn ones gets
    its first candidate.

    Args:
        is_weighed: Where a code is known and one before it is not, (images, steps, slots).
        number: Candidates of an image.
        uniforms: (images, steps + 1), for the draws of candidates.
    """

    def __init__(
        self,
        is_weighed: Bool[Tensor, "images steps slots"],
        number: int,
        uniforms: Float64[Tensor, "images draws"],
    ) -> None:
        self.number = number
        self._is_weighed = is_weighed.repeat_interleave(number, 0)
        self._uniforms = uniforms
        self._log_weights = uniforms.new_zeros(len(uniforms), number)
        self.is_weighed = is_weighed.any(0).tolist()
        """By step and slot, whether some image needs the probability of its code."""

    def weigh(
        self,
        step: int,
        slot: int,
        logits: Float64[Tensor, "rows codes"],
        codes: Int[Tensor, " rows"],
    ) -> None:
        """Takes in how likely the codes of one slot are."""
        log_prob = logits.log_softmax(-1).gather(1, codes.clamp_min(0).unsqueeze(1)).squeeze(1)
        log_prob = torch.where(self._is_weighed[:, step, slot], log_prob, 0.0)
        self._log_weights += log_prob.view_as(self._log_weights)

    def resampled(self, step: int) -> Int[Tensor, " rows"] | None:
        """Rows to go on with after a step, None for all as they are."""
        weights = self._log_weights.softmax(1)
        is_uneven = 1 / weights.square().sum(1) < self.number / 2  # effective sample size
        if not is_uneven.any():
            return None
        places = torch.arange(self.number, device=weights.device)
        # Systematic resampling: one number sets all, so that few candidates are lost by chance.
        quantiles = (places + self._uniforms[:, step : step + 1]) / self.number
        chosen = torch.where(is_uneven[:, None], self._at(weights, quantiles), places)
        self._log_weights.masked_fill_(is_uneven[:, None], 0.0)
        return self._rows(chosen)

    def final(self) -> Int[Tensor, " images"]:
        """The row that stands for each image."""
        chosen = self._at(self._log_weights.softmax(1), self._uniforms[:, -1:])
        has_weights = self._is_weighed[:: self.number].flatten(1).any(1)
        return self._rows(torch.where(has_weights[:, None], chosen, 0))

    def _at(self, weights: Tensor, quantiles: Tensor) -> Tensor:
        """Candidates at some quantiles; those of weight 0 are never chosen."""
        cumulative = weights.cumsum(1)
        quantiles = quantiles.clamp_max(1 - 2**-53).contiguous()  # a sum may be rounded up to 1
        return torch.searchsorted(cumulative / cumulative[:, -1:], quantiles, right=True)

    def _rows(self, chosen: Tensor) -> Tensor:
        first = torch.arange(len(chosen), device=chosen.device) * self.number
        return (first[:, None] + chosen).flatten()
