"""What a tokenizer consists of: shapes, quantizers, code vectors, and the roles of parameters."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.code_maps import code_maps_of
from tokenizer.code_prior import CodePrior
from tokenizer.config import CodeMapConfig, TokenizerConfig
from tokenizer.networks import ImageDecoder
from tokenizer.quantizers import Quantizer
from tokenizer.storage.pretrained import PretrainedModule
from tokenizer.topdown import TopDownPath


class TokenizerParts(PretrainedModule[TokenizerConfig]):
    """Of a tokenizer, what it is, without what it does; see `Tokenizer`, which builds the parts."""

    top_down: TopDownPath
    decoder: ImageDecoder
    code_prior: CodePrior | None

    @property
    def codebook_sizes(self) -> list[int]:
        """Number of codes of each layer, coarse to fine over all groups."""
        return [size for group in self.config.groups for size in group.codebook_sizes]

    def code_maps(self, height: int, width: int) -> tuple[CodeMapConfig, ...]:
        """Shapes of the code indices of images of this size, coarse to fine.

        Raises:
            InputError: the coarsest downsampling does not divide the size.
        """
        return code_maps_of(self.config.groups, height, width)

    @property
    def quantizers(self) -> list[Quantizer]:
        """The quantizer of each group, coarse to fine."""
        return [group.quantizer for group in self.top_down]

    @property
    def has_posterior(self) -> bool:
        """Whether every quantizer has a distribution over its codes."""
        return all(quantizer.has_posterior for quantizer in self.quantizers)

    def code_vectors(self) -> list[list[Float[Tensor, "codes dim"]]]:
        """Code vectors (K, code_dim) of each layer of each group."""
        return [
            [quantizer.codebook(layer).detach() for layer in range(quantizer.num_layers)]
            for quantizer in self.quantizers
        ]

    def dequantization_variances(self) -> Float[Tensor, " layers"]:
        """s² of each layer, coarse to fine over all groups; none where quantizers have none."""
        return torch.cat([quantizer.variances() for quantizer in self.quantizers])

    @property
    def last_decoder_weight(self) -> nn.Parameter:
        """Of the layer that makes the pixels: where losses of an image are weighed."""
        return self.decoder.last_layer.get_parameter("weight")

    def learned_roles(self) -> dict[str, Literal["codebook", "variance"]]:
        """By name, parameters of the quantizers that learn at rates of their own."""
        return {
            f"top_down.groups.{number}.quantizer.{name}": role
            for number, quantizer in enumerate(self.quantizers)
            for name, role in quantizer.learned_roles().items()
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the codebooks and variances."""
        return set(self.learned_roles())

    @property
    def _weight(self) -> Tensor:
        """One of the weights, for its type and device."""
        return next(self.parameters())
