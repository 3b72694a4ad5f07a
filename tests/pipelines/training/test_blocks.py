"""Blocks that are computed once more in the backward: the same gradients, from less memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.training.blocks import blocks, recompute_blocks
from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tokenizer import Tokenizer
from tokenizer.builders import hq_vae
from tokenizer.config import CodeMapConfig, NetworkConfig

MAPS = (CodeMapConfig(height=4, width=4, codebook_sizes=(8, 8), code_dim=4),)
INDICES = [torch.randint(8, (4, 2, 4, 4), generator=torch.Generator().manual_seed(0))]


def noisy_prior(**network: Any) -> Prior:
    """With dropout, values handed on from the first block to all others, and adaptive norms."""
    sizes = PriorNetworkConfig(
        width=64, num_spatial_layers=3, num_depth_layers=2, num_heads=2, dropout=0.2, **network
    )
    return Prior(PriorConfig(network=sizes, code_maps=MAPS))


def attentive_tokenizer() -> Tokenizer:
    networks = NetworkConfig(width=16, num_blocks=2, patch_size=2, attention_downsampling=(4,))
    return Tokenizer(hq_vae((8, 4), (2, 1), 8, 4, networks=networks))


def gradients(module: nn.Module, *inputs: Any) -> tuple[dict[str, Tensor], int]:
    """Of a step with the random numbers of seed 0; and the bytes kept between the two passes.

    The inputs of the blocks are, in either way.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for block in blocks(module):
        block.register_forward_pre_hook(lambda _, given: (note(given[0]), None)[1])
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(*inputs)
        loss = output.loss if isinstance(module, Prior) else output.reconstructions.square().mean()
    loss.backward()
    found = {name: own.grad for name, own in module.named_parameters() if own.grad is not None}
    return found, sum(kept.values())


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (noisy_prior(), (INDICES,)),
        (noisy_prior(value_residual=True, adaptive_norm=True), (INDICES,)),
        (attentive_tokenizer(), (torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32), 0.5)),
    ],
)
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit_from_less_memory(
    module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    other = copy.deepcopy(module)
    assert len([*blocks(other)]) > 4
    recompute_blocks(other)
    (expected, all_bytes), (found, fewer_bytes) = (
        gradients(own, *inputs) for own in (module, other)
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert fewer_bytes < 0.6 * all_bytes
    assert other.state_dict().keys() == module.state_dict().keys()
