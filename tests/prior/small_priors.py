"""Small priors of every kind, their logits with and without a cache."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prior import Condition, Conditioner, IncrementalDecoder, Prior, PriorConfig, PriorNetworkConfig
from tokenizer.config import CodeMapConfig

torch.set_num_threads(1)

PYRAMID = (
    CodeMapConfig(height=2, width=2, codebook_sizes=(5, 4), code_dim=3),
    CodeMapConfig(height=4, width=4, codebook_sizes=(6,), code_dim=4),
)
FLAT = (CodeMapConfig(height=2, width=3, codebook_sizes=(5,), code_dim=3),)
SINGLE = (CodeMapConfig(height=1, width=1, codebook_sizes=(5,), code_dim=3),)
ORDERS = ("coarse_to_fine", "cell")
LAYOUTS = pytest.mark.parametrize(
    ("order", "positions"), list(itertools.product(ORDERS, ("learned", "rotary")))
)
CONDITIONS = pytest.mark.parametrize("condition", ["none", "class", "custom"])
NULL = 3
"""The null class of classes 0 to 2."""


class VectorAndTokens(Conditioner):
    """Class labels again, but through products, and as two tokens beside a vector."""

    num_tokens = 2
    has_null = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.labels = nn.Embedding(NULL + 1, width)
        self.parts = nn.Linear(width, 3 * width)

    def forward(self, inputs: Tensor) -> Condition:
        parts = self.parts(self.labels(inputs)).unflatten(1, (3, -1))
        return Condition(parts[:, 0], parts[:, 1:])

    def null(self, batch: int) -> Condition:
        return self(torch.full((batch,), NULL, device=self.parts.weight.device))


def make_prior(
    code_maps: tuple[CodeMapConfig, ...] = PYRAMID,
    order: str = "cell",
    positions: str = "learned",
    condition: str = "class",
    sharpness: float = 6.0,
    **network: float,
) -> Prior:
    """One of 3 classes; with the default sharpness its outputs are far from uniform."""
    torch.manual_seed(0)
    fields = {"width": 16, "num_spatial_layers": 2, "num_depth_layers": 1, "num_heads": 2}
    config = PriorConfig(
        network=PriorNetworkConfig.model_validate(
            {**fields, "order": order, "positions": positions, **network}
        ),
        code_maps=code_maps,
        num_classes=NULL if condition == "class" else 0,
        has_custom_conditioner=condition == "custom",
    )
    width = config.network.width
    prior = Prior(config, VectorAndTokens(width) if condition == "custom" else None).eval()
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.mul_(sharpness)
    return prior


@functools.cache
def trained_prior(*layout: str, condition: str = "class", **network: bool) -> Prior:
    """One whose every parameter has moved, gains of norms included; read it only."""
    sizes: dict[str, Any] = {"width": 32, "num_depth_layers": 2, "num_heads": 4, "sharpness": 1.0}
    prior = make_prior(PYRAMID, *layout, condition=condition, **sizes, **network).train()
    optimizer = torch.optim.Adam(prior.parameters(), 2e-2)
    inputs = inputs_of(prior, [0, 2, 1, 1])
    for _ in range(8):
        optimizer.zero_grad()
        prior(random_indices(prior, 4), inputs).loss.backward()
        optimizer.step()
    return prior.eval()


def inputs_of(prior: Prior, labels: list[int]) -> Tensor | None:
    """What the conditioner takes for some labels."""
    is_conditional = prior.config.num_classes or prior.config.has_custom_conditioner
    return torch.tensor(labels) if is_conditional else None


def random_indices(prior: Prior, batch: int, seed: int = 1) -> list[Tensor]:
    return random_codes(prior.config.code_maps, batch, seed)


def random_codes(code_maps: tuple[CodeMapConfig, ...], batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.stack(
            [
                torch.randint(size, (batch, m.height, m.width), generator=generator)
                for size in m.codebook_sizes
            ],
            dim=1,
        )
        for m in code_maps
    ]


def every_logit(prior: Prior, indices: list[Tensor], inputs: Tensor | None) -> list[Tensor]:
    """Logits (B, K) by (step, slot) in the order of generation, by the full forward."""
    by_layer, ordering = prior.logits(indices, inputs), prior.ordering
    return [
        by_layer[group][layer][:, ordering.row[step, slot], ordering.column[step, slot]]
        for step, types in enumerate(ordering.steps)
        for slot, (group, _, layer) in enumerate(types)
    ]


def decoder_of(prior: Prior, inputs: Tensor | None, batch: int) -> IncrementalDecoder:
    return IncrementalDecoder(prior, prior.condition(inputs, batch), batch)


def cached_logits(decoder: IncrementalDecoder, indices: list[Tensor]) -> list[Tensor]:
    """The same from the decoder."""
    ordering = decoder.prior.ordering
    codes, logits = ordering.flatten(indices), []
    for step, slot in ordering.mask.nonzero().tolist():
        assert (decoder.step, decoder.slot) == (step, slot)
        logits.append(decoder.next_logits())
        decoder.append(codes[:, step, slot])
    return logits


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 0) -> None:
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype
        torch.testing.assert_close(tensor, other, rtol=tolerance, atol=tolerance)
