"""Quantizers with a table of code vectors for each layer, or one for all of them."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.config import GroupConfig
from tokenizer.quantizers.base import Quantizer, random_rows
from tokenizer.quantizers.mixture import nearest_codes


class CodebookQuantizer(Quantizer):
    """Nearest codes of what the layers before left over; the start from the data."""

    def __init__(self, group: GroupConfig) -> None:
        super().__init__(group)
        self.num_codebooks = 1 if group.shares_codebook else group.num_layers

    @torch.no_grad()
    def initialize(
        self, latents: Float[Tensor, "batch dim height width"], generator: torch.Generator
    ) -> None:
        """Starts each layer from what the layers before leave over, a shared codebook from Ẑ.

        Raises:
            InputError: a layer cannot start from its inputs.
        """
        residual = latents.movedim(1, -1).flatten(0, 2).to(self.codebook(0).dtype)
        for layer in range(self.num_layers):
            self.initialize_layer(layer, residual, generator)
            codebook = self.codebook(layer)
            residual = residual - codebook[nearest_codes(residual, codebook)]

    @abstractmethod
    def initialize_layer(
        self, layer: int, inputs: Float[Tensor, "positions dim"], generator: torch.Generator
    ) -> None:
        """Starts one layer; the layers from `num_codebooks` on have a codebook already."""

    def draw_codes(
        self, layer: int, inputs: Float[Tensor, "positions dim"], generator: torch.Generator
    ) -> Float[Tensor, "codes dim"]:
        """As many random inputs as the layer has codes."""
        return random_rows(inputs, len(self.codebook(layer)), generator)
