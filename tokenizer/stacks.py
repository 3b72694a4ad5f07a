"""Stacks of residual codes near a target, by beam search over the layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_SIZE = {"cpu": 2**20, "cuda": 2**26}
"""Scores worked on at once."""


def nearest_stacks(
    targets: Float[Tensor, "positions dim"],
    codebooks: Sequence[Float[Tensor, "_ dim"]],
    precisions: Float[Tensor, " positions"],
    lengths: Sequence[Float[Tensor, "positions _"]] | None,
    count: int,
    beam: int,
) -> Int[Tensor, "positions stacks depth"]:
    """The stacks with the lowest p/2 · ‖target - Σ_l b_l‖² + Σ_l length_l, the best first.

    Args:
        targets: what the sums are to come near.
        codebooks: of the layers; a stack takes one vector of each.
        precisions: p of each position.
        lengths: of each layer's codes, in nats; None counts none.
        count: at most so many stacks, and as many as there are.
        beam: partial stacks kept after a layer.
    """
    size = BLOCK_SIZE.get(targets.device.type, BLOCK_SIZE["cpu"])
    step = max(1, size // (max(beam, count) * max(map(len, codebooks))))
    blocks = [slice(start, start + step) for start in range(0, len(targets), step)]
    return torch.cat(
        [
            _nearest_of_block(
                targets[rows],
                codebooks,
                precisions[rows],
                None if lengths is None else [length[rows] for length in lengths],
                count,
                beam,
            )
            for rows in blocks
        ]
    )


def _nearest_of_block(
    targets: Tensor,
    codebooks: Sequence[Tensor],
    precisions: Tensor,
    lengths: Sequence[Tensor] | None,
    count: int,
    beam: int,
) -> Tensor:
    residual = targets.unsqueeze(1)  # (N, stacks, D)
    stacks = torch.zeros(len(targets), 1, 0, dtype=torch.int64, device=targets.device)
    spent = torch.zeros_like(targets[:, :1])  # lengths of the layers so far
    precision = precisions.view(-1, 1, 1) / 2
    for layer, codebook in enumerate(codebooks):
        squares = residual.square().sum(-1, keepdim=True) + codebook.square().sum(1)
        scores = precision * (squares - 2 * residual @ codebook.T) + spent.unsqueeze(-1)
        if lengths is not None:
            scores = scores + lengths[layer].unsqueeze(1)
        is_last = layer == len(codebooks) - 1
        kept = min(count if is_last else max(beam, count), scores[0].numel())
        chosen = scores.flatten(1).topk(kept, 1, largest=False).indices
        parent, code = chosen // len(codebook), chosen % len(codebook)
        stacks = torch.cat([_of(stacks, parent), code.unsqueeze(-1)], -1)
        residual = _of(residual, parent) - codebook[code]
        if lengths is not None:
            spent = spent.gather(1, parent) + lengths[layer].gather(1, code)
    return stacks


def _of(rows: Tensor, parent: Tensor) -> Tensor:
    """For each stack the row of the one it came from."""
    return rows.gather(1, parent.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
