"""Embeddings of codes: the tokenizer's code vectors under learned projections."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prior.ordering import CodeOrdering
from tokenizer.storage.errors import InputError


class CodeEmbedding(nn.Module):
    """Maps the code in each slot to a vector.

    Codes of one position add up in the tokenizer, so all layers of a position share a projection;
    positions at different places of a step, and groups, have their own.
    """

    code_vectors: Tensor
    """(total codes, largest code_dim): codebooks of all layers, zero-padded; saved."""
    first_row: Tensor
    """(num_steps, num_slots): row of code 0 of a slot's codebook in `table`."""

    def __init__(self, ordering: CodeOrdering, width: int) -> None:
        super().__init__()
        self.code_maps = ordering.code_maps
        positions = dict.fromkeys((slot.group, slot.offset) for slot in ordering.slot_types)
        self.groups = [group for group, _ in positions]
        self.projections = nn.ModuleList(
            nn.Linear(self.code_maps[group].code_dim, width, bias=False) for group in self.groups
        )
        self.num_codes = [sum(code_map.codebook_sizes) for code_map in self.code_maps]
        max_dim = max(code_map.code_dim for code_map in self.code_maps)
        self.register_buffer("code_vectors", torch.zeros(sum(self.num_codes), max_dim))
        self._store(
            [[torch.randn(size, m.code_dim) for size in m.codebook_sizes] for m in self.code_maps]
        )

        base, total = {}, 0
        for position in positions:
            base[position] = total
            total += self.num_codes[position[0]]
        rows = [
            base[group, offset] + sum(self.code_maps[group].codebook_sizes[:layer])
            for group, offset, layer in ordering.slot_types
        ]
        # Padding slots point at the row of zeros behind all others.
        first_row = torch.tensor(rows)[ordering.slot_type].masked_fill(~ordering.mask, total)
        self.register_buffer("first_row", first_row, persistent=False)

    def load(self, code_vectors: Sequence[Sequence[Tensor]]) -> None:
        """Stores code vectors, centered per layer and scaled per group.

        The scale makes a stack of independent codes have unit variance. Raises what
        `Prior.load_code_vectors` raises.
        """
        if len(code_vectors) != len(self.code_maps):
            raise InputError(
                f"code_vectors must hold {len(self.code_maps)} groups, got {len(code_vectors)}"
            )
        for group, (layers, code_map) in enumerate(zip(code_vectors, self.code_maps, strict=True)):
            shapes = [tuple(layer.shape) for layer in layers]
            expected = [(size, code_map.code_dim) for size in code_map.codebook_sizes]
            if shapes != expected:
                raise InputError(
                    f"code_vectors[{group}] must have the shapes {expected}, got {shapes}"
                )
            if not all(bool(layer.isfinite().all()) for layer in layers):
                raise InputError(f"code_vectors[{group}] must be finite, got NaN or infinity")
        self._store(code_vectors)

    def _store(self, code_vectors: Sequence[Sequence[Tensor]]) -> None:
        rows = []
        for layers, code_map in zip(code_vectors, self.code_maps, strict=True):
            centered = [(layer - layer.mean(0)).detach().float() for layer in layers]
            variance = torch.stack([layer.square().mean() for layer in centered]).sum()
            # A codebook of one code carries no information and stays at zero.
            scale = variance.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            padding = self.code_vectors.shape[1] - code_map.code_dim
            rows.append(nn.functional.pad(torch.cat(centered) / scale, (0, padding)))
        self.code_vectors.copy_(torch.cat(rows))

    def table(self) -> Float[Tensor, "rows width"]:
        """Embeddings of every code at every place of a step, then a row of zeros."""
        codebooks = torch.split(self.code_vectors, self.num_codes)
        parts = [
            projection(codebooks[group][:, : self.code_maps[group].code_dim]).to(codebooks[0].dtype)
            for group, projection in zip(self.groups, self.projections, strict=True)
        ]
        return torch.cat([*parts, torch.zeros_like(parts[0][:1])])

    def forward(
        self, table: Float[Tensor, "rows width"], codes: Int[Tensor, "batch steps slots"]
    ) -> Float[Tensor, "batch steps slots width"]:
        """Looks up ordered `codes`; padding slots give zeros."""
        return nn.functional.embedding(self.first_row + codes, table)
