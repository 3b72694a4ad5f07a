"""Parts of the prior's networks."""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prior.config import PriorNetworkConfig
from prior.ordering import CodeOrdering, SlotType

with warnings.catch_warnings():  # of torch 2.15, which no user can mend
    warnings.filterwarnings("ignore", "`torch.jit.script", category=FutureWarning)
    from x_transformers import ContinuousTransformerWrapper, Decoder

ROTARY_BASE = 100.0
EMBEDDING_STD = 0.5
# CUDA's attention kernels fail beyond this many sequences (pytorch/pytorch issue 142228).
MAX_SEQUENCES = 65_535


def random_embedding(number: int, width: int) -> nn.Parameter:
    """Vectors to look up or to add, (number, width)."""
    return nn.Parameter(torch.randn(number, width) * EMBEDDING_STD)


def transformer(network: PriorNetworkConfig, depth: int) -> nn.Module:
    """Causal transformer over vectors, without positions."""
    module: nn.Module = ContinuousTransformerWrapper(
        max_seq_len=None,
        attn_layers=Decoder(
            dim=network.width,
            depth=depth,
            heads=network.num_heads,
            attn_dim_head=network.width // network.num_heads,
            attn_flash=True,
            attn_qk_rmsnorm=True,
            attn_dropout=network.dropout,
            ff_dropout=network.dropout,
            ff_glu=True,
            ff_swish=True,
            use_rmsnorm=not network.adaptive_norm,
            use_adaptive_rmsnorm=network.adaptive_norm,
            dim_condition=network.width,
            add_value_residual=network.value_residual,
        ),
    )
    return module


def apply(
    module: nn.Module,
    sequences: Float[Tensor, "sequences inputs width"],
    vector: Float[Tensor, "images width"] | None,
    **given: Any,
) -> Float[Tensor, "sequences inputs width"]:
    """What a transformer makes of sequences, as many of each image in a row.

    An image's `vector` scales what adaptive norms give; None: nothing does.
    """
    parts = torch.split(sequences, MAX_SEQUENCES)
    if not module.attn_layers.need_condition:  # type: ignore[union-attr]
        return torch.cat([module(part, **given) for part in parts])
    if vector is None:
        vector = sequences.new_zeros(1, sequences.shape[2])
    vectors = torch.split(vector.repeat_interleave(len(sequences) // len(vector), 0), MAX_SEQUENCES)
    pairs = zip(parts, vectors, strict=True)
    return torch.cat([module(part, condition=own, **given) for part, own in pairs])


def predecessor_matrix(step: list[SlotType]) -> Float[Tensor, "slots values"]:
    """Which values each input of the depth transformer sums, (num_slots, 1 + num_slots).

    Values are the spatial transformer's output and the codes of the step. Input 0 is that output;
    input m sums the codes before it that share the position of code m - 1.
    """
    numbers = {position: number for number, position in enumerate(slot[:2] for slot in step)}
    positions = torch.tensor([numbers[slot[:2]] for slot in step])
    matrix = torch.zeros(len(step), len(step) + 1)
    matrix[0, 0] = 1
    matrix[1:, 1:-1] = (positions[:-1, None] == positions[None, :-1]).tril()
    return matrix


def rotary_angles(
    ordering: CodeOrdering, head_dim: int, num_tokens: int
) -> Float[Tensor, "1 inputs angles"]:
    """2-D rotary angles (1, num_tokens + num_steps, head_dim) at the positions' centers.

    The unit is a position of the finest map; half the channels turn with the row. The tokens, which
    come first, do not turn.
    """
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, head_dim // 4)
    groups, maps = ordering.group[:, 0], ordering.code_maps
    angles = []
    for coordinate, sizes in (
        (ordering.row[:, 0], torch.tensor([code_map.height for code_map in maps])),
        (ordering.column[:, 0], torch.tensor([code_map.width for code_map in maps])),
    ):
        centers = (coordinate + 0.5) * sizes[-1] / sizes[groups]
        angles.append((centers[:, None] * frequencies).repeat_interleave(2, dim=1))
    return nn.functional.pad(torch.cat(angles, dim=1), (0, 0, num_tokens, 0)).unsqueeze(0)
