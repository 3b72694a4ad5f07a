"""What a tokenizer can do with a prior of its own: see `tokenizer/code_prior.py`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tokenizer.code_maps import given_indices
from tokenizer.code_prior import CodePrior, drawn
from tokenizer.fields import check_whole
from tokenizer.parts import TokenizerParts
from tokenizer.search import CodeCosts, check_costs
from tokenizer.search_config import SearchConfig
from tokenizer.storage.errors import InputError


class WithOwnPrior(TokenizerParts):
    """Code lengths, samples and costs by `code_prior`, which may be None."""

    @torch.no_grad()
    def log_probabilities(
        self, indices: Sequence[Tensor]
    ) -> list[list[Float[Tensor, "batch height width codes"]]]:
        """Of each layer of each group: log p of every code, given those that come before it.

        Raises:
            InputError: there is no prior, or the indices do not fit.
        """
        prior, weight = self._own_prior(), self._weight
        return prior.log_probabilities(self.top_down, given_indices(indices, self.config, weight))

    @torch.no_grad()
    def code_length(
        self, codes: Float[Tensor, "batch _ _ _"] | Sequence[Int[Tensor, "batch _ _ _"]]
    ) -> Float64[Tensor, "batch layers"]:
        """-log2 p of the codes of each layer, in bits; `codes` may be images on [-1, 1].

        Raises:
            InputError: there is no prior, or what is given does not fit.
        """
        prior = self._own_prior()
        indices = self.encode(codes) if isinstance(codes, Tensor) else codes
        indices = given_indices(indices, self.config, self._weight)
        shape = (len(indices[0]), len(self.codebook_sizes))
        nats = torch.zeros(shape, dtype=torch.float64, device=indices[0].device)
        for now in prior.passes(self.top_down, indices, 0):
            chosen = now.codes[:, now.positions].unsqueeze(-1)
            nats[:, now.layer] -= now.log_probabilities.gather(-1, chosen).double().sum((1, 2))
        return nats / math.log(2)

    @torch.no_grad()
    def sample(
        self,
        num_images: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Images from the tokenizer alone: codes drawn from its own prior, decoded.

        Args:
            num_images: how many.
            height: in pixels; any that the networks allow.
            width: likewise.
            generator: on the tokenizer's device.

        Raises:
            InputError: there is no prior, or no such image.
        """
        prior, device = self._own_prior(), self._weight.device
        check_whole("num_images", num_images, 1)
        empty = [
            torch.zeros(
                *(num_images, own.depth, own.height, own.width), dtype=torch.int64, device=device
            )
            for own in self.code_maps(height, width)
        ]
        indices = prior.completed(self.top_down, empty, 0, drawn(generator))
        images: Tensor = self.decode(indices)
        return images

    def costs_for(self, search: SearchConfig, costs: CodeCosts | None = None) -> CodeCosts | None:
        """What a search counts: `costs`, or the tokenizer's own prior if it is to count any.

        Raises:
            InputError: there is none, or it would not count.
        """
        if costs is None and search.rate_weight > 0 and self.code_prior is not None:
            return self
        check_costs(search, costs)
        return costs

    def encode(self, images: Any) -> list[Tensor]:
        """See `Tokenizer`."""
        raise NotImplementedError

    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        """See `Tokenizer`."""
        raise NotImplementedError

    def _own_prior(self) -> CodePrior:
        if self.code_prior is None:
            raise InputError(
                "tokenizer.code_prior.width must be > 0 for this: the tokenizer has no prior"
            )
        return self.code_prior
