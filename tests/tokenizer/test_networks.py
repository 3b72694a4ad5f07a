"""Residual networks: shapes, reach and gradients."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tokenizer.config import NetworkConfig
from tokenizer.networks import BottomUpPath, ImageDecoder, ResidualBlock, SelfAttention, Widths


def test_widths_double_at_each_halving_up_to_the_limit() -> None:
    widths = Widths(NetworkConfig(patch_size=2, width=8, max_width=20), 16)
    assert [widths[factor] for factor in (2, 4, 8, 16)] == [8, 16, 20, 20]


def test_the_last_layer_of_a_block_is_scaled_by_the_root_of_the_number_of_blocks() -> None:
    # Three resolutions, 2, 4 and 8, of three blocks.
    fields = {"patch_size": 2, "width": 8, "max_width": 8, "num_blocks": 3}
    config = NetworkConfig(**fields, attention_downsampling=(4,))
    torch.manual_seed(0)
    found = Widths(config, 8).stage(4)
    torch.manual_seed(0)
    blocks = [*(ResidualBlock(8, 1.0) for _ in range(3)), SelfAttention(8, 1.0)]
    for block in blocks:
        last = block.to_output if isinstance(block, SelfAttention) else block.layers[-1]
        last.get_parameter("weight").data /= math.sqrt(9)
    torch.testing.assert_close(found.state_dict(), nn.Sequential(*blocks).state_dict())


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
    path = BottomUpPath(Widths(NetworkConfig(width=8, attention_downsampling=(4,)), 8), 3, [8])
    for factor, stage in path.stages.items():
        has_attention = any(isinstance(layer, SelfAttention) for layer in stage.modules())
        assert has_attention == (factor == "4")


def test_a_head_starts_as_the_identity_and_sees_across_patches() -> None:
    network = {"patch_size": 4, "width": 8, "max_width": 8, "num_blocks": 1}
    plain, headed = (
        ImageDecoder(Widths(NetworkConfig(**network, head_width=width), 8), 6, 8, 3)
        for width in (0, 5)
    )
    assert headed.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    state = torch.randn(2, 6, 3, 3)
    images = plain(state)
    assert images.shape == (2, 3, 24, 24)
    assert torch.equal(headed(state), images)
    assert plain.last_layer is plain.layers[-1]
    assert headed.head is not None
    assert headed.last_layer is headed.head[-1]
    torch.nn.init.normal_(headed.last_layer.weight)
    wanted = images + headed.head(images)
    torch.testing.assert_close(headed(state), wanted)
    assert not torch.equal(wanted, images)
