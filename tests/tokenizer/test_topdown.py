"""The top-down path against its equations, with the sub-networks as black boxes."""

import pytest
import torch
from torch import Tensor

from tokenizer.builders import deterministic, hq_vae
from tokenizer.config import NetworkConfig, TokenizerConfig
from tokenizer.networks import Widths
from tokenizer.quantizers.base import Mode
from tokenizer.topdown import TopDownOutput, TopDownPath

NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)
CHANNELS = (3, 5)


def make_path(config: TokenizerConfig | None = None, seed: int = 0) -> TopDownPath:
    torch.manual_seed(seed)
    config = config or hq_vae((8, 4), (2, 3), 6, 4, networks=NETWORKS)
    widths = Widths(config.networks, config.groups[0].downsampling)
    return TopDownPath(config, widths, CHANNELS[: len(config.groups)]).double()


def random_features(seed: int = 1, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, side, 2 * side, generator=generator, dtype=torch.float64)
        for channels, side in zip(CHANNELS, (1, 2), strict=True)
    ]


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["mixture", "sample", "nearest"])
def test_the_state_and_latents_follow_the_equations_of_injected_and_residual_layers(
    mode: Mode,
) -> None:
    path, features = make_path(), random_features()
    walk = path(features, mode, 0.5, seeded())
    coarse, fine = path
    assert coarse.up is None
    # Injected coarsest layer: no U. y = Z_1 + Z_2 of the group.
    torch.testing.assert_close(walk.latents[0], coarse.to_latents(features[0]))
    state = walk.groups[0].quantized
    # Ẑ = f(concat[up(y), features]); y = up(y) + ΣZ.
    assert fine.up is not None
    upsampled = fine.up(state)
    expected = fine.to_latents(torch.cat([upsampled, features[1]], 1))
    torch.testing.assert_close(walk.latents[1], expected)
    torch.testing.assert_close(walk.state, upsampled + walk.groups[1].quantized)


def test_one_generator_serves_the_groups_in_turn() -> None:
    path, features = make_path(), random_features()
    generator = seeded()
    first = path(features, "sample", 1.0, generator)
    generator = seeded()
    for group, latents, output in zip(path, first.latents, first.groups, strict=True):
        again = group.quantizer(latents, "sample", 1.0, generator)
        assert torch.equal(again.indices, output.indices)


@pytest.mark.parametrize("is_baseline", [False, True])
def test_decoding_hard_indices_gives_the_state_of_the_walk(is_baseline: bool) -> None:
    config = hq_vae((8, 4), (2, 3), 6, 4, networks=NETWORKS)
    path = make_path(deterministic(config) if is_baseline else config).eval()
    walk = path(random_features(), "nearest")
    state = path.decode([group.indices for group in walk.groups], 5)
    torch.testing.assert_close(state, walk.state)


def literal_state(path: TopDownPath, walk: TopDownOutput, num_layers: int) -> Tensor:
    """The state y from some layers: code vectors added one by one."""
    coarse, fine = path
    state = torch.zeros_like(walk.groups[0].quantized)
    for layer in range(min(num_layers, 2)):
        codes = coarse.quantizer.codebook(layer)[walk.groups[0].indices[:, layer]]
        state = state + codes.permute(0, 3, 1, 2)
    assert fine.up is not None
    state = fine.up(state)
    for layer in range(num_layers - 2):
        codes = fine.quantizer.codebook(layer)[walk.groups[1].indices[:, layer]]
        state = state + codes.permute(0, 3, 1, 2)
    return state


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_decoding_some_layers_adds_nothing_for_the_later_ones(num_layers: int) -> None:
    path = make_path()
    walk = path(random_features(), "nearest")
    indices = [group.indices for group in walk.groups]
    state = path.decode(indices, num_layers)
    torch.testing.assert_close(state, literal_state(path, walk, num_layers))
    flat = [(group, layer) for group, depth in enumerate((2, 3)) for layer in range(depth)]
    for group, layer in flat[num_layers:]:
        indices[group] = indices[group].clone()
        indices[group][:, layer] = 0
    assert torch.equal(state, path.decode(indices, num_layers))


def test_the_state_depends_on_the_features_through_the_codes_alone() -> None:
    path, features = make_path(), random_features()
    walk = path(features, "nearest")
    nudged = [entry + 1e-9 for entry in features]
    again = path(nudged, "nearest")
    assert not torch.equal(again.latents[0], walk.latents[0])
    assert torch.equal(again.state, walk.state)


def test_gradients_of_a_fine_group_reach_the_coarse_codebooks() -> None:
    path = make_path()
    walk = path(random_features(), "mixture", 0.5, seeded())
    entropy = walk.groups[1].posterior_entropy.sum()
    for layer in range(2):
        codebook = next(iter(path)).quantizer.codebook(layer)
        (gradient,) = torch.autograd.grad(entropy, codebook, retain_graph=True)
        assert (gradient != 0).any()


def test_each_group_starts_from_latents_given_the_started_groups_before() -> None:
    path, features = make_path(), random_features(batch=12)
    with torch.no_grad():
        walk = path(features, "nearest", initialization=seeded())
        again = path(features, "nearest")
    assert torch.equal(walk.state, again.state)
    for first, second in zip(walk.latents, again.latents, strict=True):
        assert torch.equal(first, second)
    for group, latents in zip(path, walk.latents, strict=True):
        spread = latents.movedim(1, -1).flatten(0, 2).var(0, correction=0).mean().item()
        assert group.quantizer.variances()[0].item() == pytest.approx(5 * spread)
