"""The top-down path against its equations, with the sub-networks as black boxes."""

import pytest
import torch
from torch import Tensor

from tests.tokenizer.tiny import HYBRID, KINDS, make_tokenizer, random_images, seeded
from tokenizer.quantizers.base import Mode
from tokenizer.topdown import TopDownPath


def make_path(kind: str = "stochastic", seed: int = 0) -> TopDownPath:
    return make_tokenizer(KINDS[kind], seed).top_down


def random_features(batch: int = 2) -> list[Tensor]:
    features: list[Tensor] = make_tokenizer(HYBRID).bottom_up(random_images(batch=batch))
    return [entry.detach() for entry in features]


@pytest.mark.parametrize("mode", ["mixture", "sample", "nearest"])
def test_the_state_and_latents_follow_the_equations_of_injected_and_residual_layers(
    mode: Mode,
) -> None:
    path, features = make_path(), random_features()
    output = path(features, mode, 0.5, seeded())
    coarse, fine = path
    # Injected coarsest layer: no U. y = Z_1 + Z_2 of the group.
    assert coarse.up is None
    torch.testing.assert_close(output.latents[0], coarse.to_latents(features[0]))
    # Ẑ = f(concat[up(y), features]); y = up(y) + ΣZ.
    assert fine.up is not None
    upsampled = fine.up(output.groups[0].quantized)
    expected = fine.to_latents(torch.cat([upsampled, features[1]], 1))
    torch.testing.assert_close(output.latents[1], expected)
    torch.testing.assert_close(output.state, upsampled + output.groups[1].quantized)
    # One generator serves the groups in turn.
    generator = seeded()
    for group, latents, found in zip(path, output.latents, output.groups, strict=True):
        again = group.quantizer(latents, mode, 0.5, generator)
        assert torch.equal(again.quantized, found.quantized)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_decoding_some_layers_adds_nothing_for_the_later_ones(num_layers: int, kind: str) -> None:
    path = make_path(kind)
    output = path(random_features(), "nearest")
    indices = [group.indices for group in output.groups]
    state = path.decode(indices, num_layers)
    expected, left = torch.zeros(()), num_layers
    for group, chosen in zip(path, indices, strict=True):
        expected = expected if group.up is None else group.up(expected)
        for layer in range(min(left, group.quantizer.num_layers)):
            codes = group.quantizer.codebook(layer)[chosen[:, layer]]
            expected, left = expected + codes.movedim(-1, 1), left - 1
    torch.testing.assert_close(state, expected)
    if num_layers == 5:
        assert torch.equal(state, output.state)


def test_gradients_of_a_fine_group_reach_the_coarse_codebooks() -> None:
    path = make_path()
    output = path(random_features(), "mixture", 0.5, seeded())
    entropy = output.groups[1].posterior_entropy.sum()
    for layer in range(2):
        codebook = next(iter(path)).quantizer.codebook(layer)
        (gradient,) = torch.autograd.grad(entropy, codebook, retain_graph=True)
        assert (gradient != 0).any()


def test_each_group_starts_from_latents_given_the_started_groups_before() -> None:
    path, features = make_path(), random_features(batch=12)
    with torch.no_grad():
        output = path(features, "nearest", initialization=seeded())
        again = path(features, "nearest")
    assert torch.equal(output.state, again.state)
    for first, second in zip(output.latents, again.latents, strict=True):
        assert torch.equal(first, second)
    for group, latents in zip(path, output.latents, strict=True):
        spread = latents.movedim(1, -1).flatten(0, 2).var(0, correction=0).mean().item()
        assert group.quantizer.variances()[0].item() == pytest.approx(5 * spread)
