"""Quantizers of vector-quantize-pytorch in the place of ours, everything else unchanged."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ

from tokenizer import GroupConfig, Quantizer, QuantizerOutput
from tokenizer.quantizers.base import Mode

Peer = Literal["ResidualVQ", "FSQ", "SimVQ", "LFQ"]

FSQ_LEVELS = {16: (4, 4), 64: (8, 8), 128: (8, 4, 4), 256: (8, 8, 4), 512: (8, 8, 8)}
"""Levels per dimension with exactly K products, so that the bits are equal."""


class PeerQuantizer(Quantizer):
    """One group quantized by a peer.

    Each peer has the setting that its documentation recommends (LFQ: that of its author's MAGVIT-2;
    without a commitment its gradient became infinite here). Its auxiliary loss is the latent
    term: the recipe's weight is to be 1.
    """

    def __init__(self, group: GroupConfig, peer: Peer) -> None:
        super().__init__(group)
        self.size = group.codebook_sizes[0]
        self.peer = _build(peer, group)

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Code vectors of a layer."""
        if isinstance(self.peer, ResidualVQ):
            vectors: Tensor = self.peer.codebooks[layer]
        elif isinstance(self.peer, SimVQ):
            vectors = self.peer.codebook
        else:
            indices = torch.arange(self.size, device=next(self.parameters()).device)
            vectors = self.peer.indices_to_codes(indices)
        return vectors

    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantizes `latents`, whatever `temperature` and `generator`."""
        batch, _, height, width = latents.shape
        quantized, indices, *losses = self.peer(latents.flatten(2).mT)  # (B, N, D)
        zeros = torch.zeros_like(latents[:, 0, 0, 0])
        loss = torch.stack([entry.sum() for entry in losses]).sum() if losses else zeros[0]
        return QuantizerOutput(
            quantized.mT.reshape(latents.shape),
            indices.view(batch, height, width, -1).movedim(-1, 1).long(),
            zeros.unsqueeze(1).expand(batch, self.num_layers),
            {"commitment": zeros + loss},
        )

    @torch.no_grad()
    def initialize(
        self, latents: Float[Tensor, "batch dim height width"], generator: torch.Generator
    ) -> None:
        """A forward pass in training mode, in which k-means sets the codebooks of ResidualVQ."""
        self.peer.train()(latents.flatten(2).mT)


def _build(peer: Peer, group: GroupConfig) -> Any:
    size = group.codebook_sizes[0]
    if peer == "ResidualVQ":
        return ResidualVQ(
            dim=group.code_dim,
            num_quantizers=group.num_layers,
            codebook_size=size,
            kmeans_init=True,
            kmeans_iters=10,
            threshold_ema_dead_code=2,
            rotation_trick=True,
        )
    assert group.num_layers == 1, f"{peer} has one layer"
    if peer == "FSQ":
        levels = FSQ_LEVELS[size]
        assert math.prod(levels) == size
        return FSQ(levels, dim=group.code_dim)
    if peer == "SimVQ":
        return SimVQ(dim=group.code_dim, codebook_size=size, rotation_trick=True)
    return LFQ(
        codebook_size=size,
        dim=group.code_dim,
        entropy_loss_weight=0.1,
        diversity_gamma=2.5,
        commitment_loss_weight=1.0,
    )
