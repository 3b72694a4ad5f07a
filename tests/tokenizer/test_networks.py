"""Residual networks: shapes, reach and gradients."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tokenizer.config import NetworkConfig
from tokenizer.networks import BottomUpPath, ResidualBlock, SelfAttention, UpwardPath, Widths

SMALL = NetworkConfig(width=8, max_width=16, num_blocks=1)


@settings(max_examples=15)
@given(
    patch_power=st.integers(0, 2),
    powers=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    channels=st.integers(1, 4),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
)
def test_the_bottom_up_path_gives_a_map_per_downsampling(
    patch_power: int, powers: list[int], channels: int, rows: int, columns: int
) -> None:
    downsamplings = [2 ** (patch_power + power) for power in powers]
    config = NetworkConfig(patch_size=2**patch_power, width=4, max_width=8, num_blocks=1)
    path = BottomUpPath(Widths(config, max(downsamplings)), channels, downsamplings)
    height, width = rows * max(downsamplings), columns * max(downsamplings)
    features = path(torch.randn(2, channels, height, width))
    for factor, found, num_channels in zip(downsamplings, features, path.out_channels, strict=True):
        assert found.shape == (2, num_channels, height // factor, width // factor)


@pytest.mark.parametrize(("coarse", "fine"), [(8, 8), (8, 4), (8, 2), (16, 1)])
def test_the_upward_path_multiplies_the_sides(coarse: int, fine: int) -> None:
    config = NetworkConfig(patch_size=1, width=4, max_width=8, num_blocks=1)
    path = UpwardPath(Widths(config, 16), 5, coarse, fine, 7)
    factor = coarse // fine
    assert path(torch.randn(2, 5, 2, 3)).shape == (2, 7, 2 * factor, 3 * factor)


def test_widths_double_at_each_halving_up_to_the_limit() -> None:
    widths = Widths(NetworkConfig(patch_size=2, width=8, max_width=20), 16)
    assert [widths[factor] for factor in (2, 4, 8, 16)] == [8, 16, 20, 20]


def test_the_last_layer_of_a_block_is_scaled_by_the_root_of_the_number_of_blocks() -> None:
    def last_weights(build: Callable[[], nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        built = build()
        return [
            own.to_output.weight if isinstance(own, SelfAttention) else own.layers[-1].weight
            for own in built.modules()
            if isinstance(own, ResidualBlock | SelfAttention)
        ]

    for block in (ResidualBlock, SelfAttention):
        (scaled,) = last_weights(functools.partial(block, 8, 0.25))
        (plain,) = last_weights(functools.partial(block, 8, 1.0))
        torch.testing.assert_close(scaled, 0.25 * plain)
    # Three resolutions, 2, 4 and 8, of three blocks.
    widths = Widths(NetworkConfig(patch_size=2, width=8, max_width=8, num_blocks=3), 8)
    found = last_weights(lambda: widths.stage(4))
    scale = 1 / math.sqrt(9)
    expected = last_weights(lambda: nn.Sequential(*[ResidualBlock(8, scale) for _ in range(3)]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_block_is_gelu_and_convolutions_of_sides_1_3_3_1_around_a_skip() -> None:
    block, features = ResidualBlock(8, 1.0), torch.randn(2, 8, 4, 5)
    convolutions = [layer for layer in block.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.kernel_size[0] for layer in convolutions] == [1, 3, 3, 1]
    assert [layer.out_channels for layer in convolutions] == [2, 2, 2, 8]
    hidden = features
    for layer in convolutions:
        hidden = functional.conv2d(
            functional.gelu(hidden), layer.weight, layer.bias, padding=layer.padding
        )
    torch.testing.assert_close(block(features), features + hidden)


@pytest.mark.parametrize("channels", [8, 96, 65])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_is_the_softmax_of_the_scaled_products(
    channels: int, memory_format: torch.memory_format
) -> None:
    attention = SelfAttention(channels, 1.0).double()
    features = torch.randn(2, channels, 2, 3).double().to(memory_format=memory_format)
    normalized = functional.group_norm(features, 1, attention.norm.weight, attention.norm.bias)
    joint = attention.to_query_key_value(normalized).flatten(2)  # (B, 3C, N)
    query, key, value = joint.chunk(3, 1)
    size = channels // attention.num_heads
    heads = []
    for start in range(0, channels, size):
        rows = slice(start, start + size)
        products = torch.einsum("bcn,bcm->bnm", query[:, rows], key[:, rows])
        weights = (products / math.sqrt(size)).softmax(2)
        heads.append(torch.einsum("bnm,bcm->bcn", weights, value[:, rows]))
    merged = attention.to_output(torch.cat(heads, 1).view(features.shape))
    torch.testing.assert_close(attention(features), features + merged)


def test_attention_stands_at_the_chosen_downsamplings_alone() -> None:
    config = SMALL.model_copy(update={"attention_downsampling": (4,)})
    path = BottomUpPath(Widths(config, 8), 3, [8])
    for factor, stage in path.stages.items():
        has_attention = any(isinstance(layer, SelfAttention) for layer in stage.modules())
        assert has_attention == (factor == "4")
