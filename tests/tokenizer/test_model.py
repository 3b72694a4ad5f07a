"""The tokenizer: its objectives against literal references, round trips, errors, golden numbers."""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenizer import (
    InputError,
    Tokenizer,
    TokenizerConfig,
    TokenizerOutput,
    hq_vae,
    rsq_vae,
    sq_vae,
    sq_vae_2,
)
from tokenizer.builders import deterministic
from tokenizer.config import NetworkConfig
from tokenizer.quantizers import NearestQuantizerConfig

NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)
HYBRID = hq_vae((8, 4), (2, 3), 6, 4, networks=NETWORKS)
BASELINE = deterministic(HYBRID)
TINY = hq_vae((8, 4), (2, 1), 8, 4, networks=NETWORKS)
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_tiny.json"


def make_tokenizer(config: TokenizerConfig = HYBRID, seed: int = 0) -> Tokenizer:
    """A float64 tokenizer in training mode whose layers differ in s²."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config).double()
    tokenizer.total_steps = 10
    offset = 0.0
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("log_variances"):
                parameter.copy_(offset + 0.4 * torch.arange(len(parameter)))
                offset -= 0.7
    return tokenizer


def random_images(seed: int = 1, batch: int = 2, channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, side, 2 * side)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


LATE_TEMPERATURE = 0.4 ** ((8 / 9 - 0.7) / 0.3)
"""Of step 8 of 10: after 70 % at 1, exponentially towards 0.4."""


def run(tokenizer: Tokenizer, images: Tensor, step: int = 8, seed: int = 5) -> TokenizerOutput:
    torch.manual_seed(seed)
    output: TokenizerOutput = tokenizer(images, step)
    return output


def unpatched(patches: Tensor) -> Tensor:
    """(B, C·2·2, h, w) to (B, C, 2h, 2w), value by value."""
    batch, channels, height, width = patches.shape
    images = patches.new_zeros(batch, channels // 4, 2 * height, 2 * width)
    for channel, row, column in itertools.product(range(channels // 4), range(2), range(2)):
        images[:, channel, row::2, column::2] = patches[:, 4 * channel + 2 * row + column]
    return images


def literal_objective(
    tokenizer: Tokenizer, images: Tensor, temperature: float, seed: int
) -> dict[str, Tensor]:
    """Every term from its formula, with the networks as black boxes; sums, then batch means."""
    torch.manual_seed(seed)
    batch = len(images)
    error, entropies, state = torch.zeros(()).double(), [], None
    features = tokenizer.bottom_up(images)
    for group, own_features in zip(tokenizer.top_down, features, strict=True):
        upsampled = None if state is None else group.up(state)
        inputs = own_features if upsampled is None else torch.cat([upsampled, own_features], 1)
        latents = group.to_latents(inputs)
        variances = group.quantizer.log_variances.exp()
        residual, total = latents, torch.zeros_like(latents)
        for layer in range(group.quantizer.num_layers):
            codebook, s2 = group.quantizer.codebook(layer), variances[layer]
            differences = residual.permute(0, 2, 3, 1).unsqueeze(-2) - codebook  # (B, H, W, K, D)
            posterior = (-(differences**2).sum(-1) / (2 * s2)).softmax(-1)
            entropies.append(-(posterior * posterior.log()).sum() / batch)
            noise = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            uniform = torch.empty_like(posterior).uniform_(2**-25, 1, generator=noise)
            gumbel = -torch.log(-uniform.log())
            weights = ((posterior.log() + gumbel) / temperature).softmax(-1)
            mixture = torch.einsum("bhwk,kd->bdhw", weights, codebook)
            total, residual = total + mixture, residual - mixture
        error = error + ((latents - total) ** 2).sum() / batch / (2 * variances.sum())
        state = total if upsampled is None else upsampled + total
    reconstructions = unpatched(tokenizer.decoder(state))
    squared_error = ((images - reconstructions) ** 2).sum() / batch
    num_values = images[0].numel()
    reconstruction = num_values / 2 * torch.log(squared_error / num_values)
    entropy = torch.stack(entropies).sum()
    latent_weight = tokenizer.config.quantizer.model_dump()["latent_weight"]
    return {
        "loss": reconstruction + latent_weight * (error - entropy),
        "reconstruction": reconstruction,
        "quantization_error": error,
        "posterior_entropy": entropy,
        "commitment": torch.zeros(()).double(),
        "layer_entropy": torch.stack(entropies),
        "squared_error": squared_error,
        "reconstructions": reconstructions,
    }


MEMBERS = {
    "SQ-VAE": sq_vae(4, 6, 4, networks=NETWORKS),
    "SQ-VAE-2": sq_vae_2((8, 4, 2), 6, 4, networks=NETWORKS),
    "RSQ-VAE": rsq_vae(4, 3, 6, 4, networks=NETWORKS),
    "RSQ-VAE, one codebook": rsq_vae(4, 3, 6, 4, shares_codebook=True, networks=NETWORKS),
    "HQ-VAE": HYBRID,
}
FAMILY = pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS.keys())
BOTH_KINDS = pytest.mark.parametrize("config", [HYBRID, BASELINE], ids=["stochastic", "nearest"])


# The objectives.


@FAMILY
def test_the_training_objective_equals_the_literal_formulas(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config), random_images()
    output = run(tokenizer, images)
    for name, expected in literal_objective(tokenizer, images, LATE_TEMPERATURE, 5).items():
        torch.testing.assert_close(getattr(output, name), expected, msg=name)


@FAMILY
def test_the_gradients_equal_those_of_the_literal_formulas(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config), random_images()
    parameters = list(tokenizer.parameters())
    found = torch.autograd.grad(run(tokenizer, images).loss, parameters)
    loss = literal_objective(tokenizer, images, LATE_TEMPERATURE, 5)["loss"]
    for first, second in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(first, second)


def test_the_baseline_objective_equals_the_literal_formula() -> None:
    config = deterministic(HYBRID, NearestQuantizerConfig(commitment_weight=0.3))
    tokenizer, images = make_tokenizer(config), random_images()
    output = run(tokenizer, images)
    walk = tokenizer.encode_with_latents(images)
    num_values, commitment = images[0].numel(), torch.zeros(()).double()
    for group, latents, indices in zip(tokenizer.top_down, walk.latents, walk.indices, strict=True):
        total, depth = torch.zeros_like(latents), indices.shape[1]
        for layer in range(depth):
            total = total + group.quantizer.codebook(layer)[indices[:, layer]].permute(0, 3, 1, 2)
            commitment = commitment + ((latents - total) ** 2).mean() / depth
    squared_error = ((images - tokenizer.reconstruct(images)) ** 2).sum() / len(images)
    torch.testing.assert_close(output.commitment, num_values / 2 * 0.3 * commitment)
    torch.testing.assert_close(output.reconstruction, squared_error / 2)
    torch.testing.assert_close(output.loss, output.reconstruction + output.commitment)
    # Over D/2, the usual mean squared error + weight · commitment.
    usual = ((images - output.reconstructions) ** 2).mean() + 0.3 * commitment
    torch.testing.assert_close(output.loss / (num_values / 2), usual)


def test_rsq_vae_with_one_layer_is_sq_vae() -> None:
    # Fact 2.
    residual, single = rsq_vae(4, 1, 6, 4, networks=NETWORKS), MEMBERS["SQ-VAE"]
    images = random_images()
    first, second = run(make_tokenizer(residual), images), run(make_tokenizer(single), images)
    assert_same_outputs(first, second)
    assert first.layer_entropy.shape == (1,)


def test_hq_vae_with_one_layer_per_group_is_sq_vae_2() -> None:
    # Fact 2.
    hybrid = hq_vae((8, 4, 2), (1, 1, 1), 6, 4, networks=NETWORKS)
    images = random_images()
    first = run(make_tokenizer(hybrid), images)
    assert_same_outputs(first, run(make_tokenizer(MEMBERS["SQ-VAE-2"]), images))
    assert first.layer_entropy.shape == (3,)


def test_sq_vae_2_with_one_resolution_is_sq_vae() -> None:
    images = random_images()
    first = run(make_tokenizer(sq_vae_2((4,), 6, 4, networks=NETWORKS)), images)
    assert_same_outputs(first, run(make_tokenizer(MEMBERS["SQ-VAE"]), images))


def assert_same_outputs(first: TokenizerOutput, second: TokenizerOutput) -> None:
    for name, value, other in zip(first._fields, first, second, strict=True):
        values = value if isinstance(value, list) else [value]
        others = other if isinstance(other, list) else [other]
        for entry, counterpart in zip(values, others, strict=True):
            assert torch.equal(entry, counterpart), name


def test_the_squared_error_is_averaged_over_the_batch_before_the_logarithm() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images(batch=3)
    images[0] *= 0.01
    num_values = images[0].numel()
    together = tokenizer(images, 0)
    alone = torch.stack([tokenizer(image.unsqueeze(0), 0).squared_error for image in images])
    expected = num_values / 2 * (alone.mean() / num_values).log()
    torch.testing.assert_close(together.reconstruction, expected)
    per_image = (num_values / 2 * (alone / num_values).log()).mean()
    assert abs(together.reconstruction - per_image) > 1


def test_terms_are_sums_over_values_and_means_over_images() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    once, twice = tokenizer(images, 0), tokenizer(torch.cat([images, images]), 0)
    for name in ("loss", "quantization_error", "squared_error"):
        torch.testing.assert_close(getattr(once, name), getattr(twice, name))
    difference = images - once.reconstructions
    torch.testing.assert_close(once.squared_error, difference.square().flatten(1).sum(1).mean())


@FAMILY
def test_every_parameter_gets_a_gradient(config: TokenizerConfig) -> None:
    # Fact 6.
    networks = NETWORKS.model_copy(update={"attention_downsampling": (4,)})
    tokenizer = make_tokenizer(config.model_copy(update={"networks": networks}))
    run(tokenizer, random_images()).loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_every_parameter_of_a_baseline_gets_a_gradient() -> None:
    tokenizer = make_tokenizer(BASELINE)
    output = run(tokenizer, random_images())
    output.loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_commitment_alone_reaches_the_encoder_and_not_the_decoder() -> None:
    tokenizer = make_tokenizer(BASELINE)
    run(tokenizer, random_images()).commitment.backward()
    for parameter in tokenizer.bottom_up.parameters():
        assert parameter.grad is not None
    for parameter in tokenizer.decoder.parameters():
        assert parameter.grad is None


@BOTH_KINDS
def test_terms_stay_in_float32_under_autocast(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config).float(), random_images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(tokenizer, images)
    for name, value in output._asdict().items():
        if name != "indices":
            assert value.dtype == torch.float32, name
            assert value.isfinite().all(), name
    output.loss.backward()


def test_evaluation_is_deterministic_and_knows_no_step() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    tokenizer.total_steps = None
    first, second = run(tokenizer, images, 0, seed=1), run(tokenizer, images, 9, seed=2)
    assert_same_outputs(first, second)
    assert torch.equal(first.reconstructions, tokenizer.reconstruct(images))


def test_training_lowers_the_error_of_hard_reconstructions() -> None:
    networks = NetworkConfig(width=16, max_width=16, num_blocks=1)
    tokenizer = Tokenizer(hq_vae((8, 4), (2, 1), 16, 8, networks=networks))
    coarse = torch.rand(4, 3, 2, 2)
    images = 2 * torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear") - 1
    tokenizer.total_steps = 120
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(0))
    before = (tokenizer.reconstruct(images) - images).square().mean()
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    for step in range(120):
        optimizer.zero_grad()
        (tokenizer(images, step).loss * 2 / images[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 0.5)
        optimizer.step()
    after = (tokenizer.reconstruct(images) - images).square().mean()
    assert after < 0.3 * before


# The evidence lower bound.


def enumerate_codes(
    tokenizer: Tokenizer, images: Tensor
) -> Iterator[tuple[list[Tensor], float, float]]:
    """(Indices, log Q(indices | x), latent terms without the log K) of one image, all codes."""
    features = tokenizer.bottom_up(images)
    groups = list(tokenizer.top_down)

    def extend(
        position: int, state: Tensor | None, indices: list[Tensor], log_q: float, terms: float
    ) -> Iterator[tuple[list[Tensor], float, float]]:
        if position == len(groups):
            yield indices, log_q, terms
            return
        group = groups[position]
        inputs = features[position]
        upsampled = None
        if state is not None:
            upsampled = group.up(state)
            inputs = torch.cat([upsampled, inputs], 1)
        latents = group.to_latents(inputs)
        height, width = latents.shape[2:]
        depth = group.quantizer.num_layers
        variances = group.quantizer.log_variances.exp().tolist()
        codebooks = [group.quantizer.codebook(layer) for layer in range(depth)]
        choices = [range(len(codebook)) for codebook in codebooks for _ in range(height * width)]
        for choice in itertools.product(*choices):
            own = torch.tensor(choice).view(1, depth, height, width)
            own_log_q, entropy, distance = 0.0, 0.0, 0.0
            quantized = torch.zeros_like(latents)
            for h, w in itertools.product(range(height), range(width)):
                rest = latents[0, :, h, w]
                for codebook, s2, k in zip(codebooks, variances, own[0, :, h, w], strict=True):
                    logits = -(rest - codebook).square().sum(1) / (2 * s2)
                    log_posterior = logits - logits.logsumexp(0)
                    own_log_q += log_posterior[k].item()
                    entropy -= (log_posterior.exp() * log_posterior).sum().item()
                    rest = rest - codebook[k]
                    quantized[0, :, h, w] += codebook[k]
                distance += rest.square().sum().item()
            error = distance / (2 * sum(variances))
            following = quantized if upsampled is None else upsampled + quantized
            yield from extend(
                position + 1,
                following,
                [*indices, own],
                log_q + own_log_q,
                terms + error - entropy,
            )

    yield from extend(0, None, [], 0.0, 0.0)


ENUMERABLE = {
    "SQ-VAE": (sq_vae(4, 3, 2, networks=NETWORKS, channels=1), (4, 8)),
    "RSQ-VAE": (rsq_vae(4, 2, 3, 2, networks=NETWORKS, channels=1), (4, 4)),
    "HQ-VAE": (hq_vae((8, 4), (2, 1), 2, 2, networks=NETWORKS, channels=1), (8, 8)),
}


@torch.no_grad()
@pytest.mark.parametrize(("config", "size"), ENUMERABLE.values(), ids=ENUMERABLE.keys())
def test_the_bound_is_exact_per_sample_and_bounds_the_exact_likelihood_on_average(
    config: TokenizerConfig, size: tuple[int, int]
) -> None:
    tokenizer = make_tokenizer(config).eval()
    images = 2 * torch.rand(1, 1, *size).double() - 1
    num_values, variance = images.numel(), 0.3
    maps = tokenizer.code_maps(*size)
    num_codes = sum(
        code_map.height * code_map.width * math.log(codebook_size)
        for code_map in maps
        for codebook_size in code_map.codebook_sizes
    )  # log of their number
    bounds, weights, log_joints = [], [], []
    for indices, log_q, terms in enumerate_codes(tokenizer, images):
        difference = (images - tokenizer.decode(indices)).square().sum().item()
        log_density = -difference / (2 * variance)
        log_density -= num_values / 2 * math.log(2 * math.pi * variance)
        log_mass = log_density + num_values * math.log(2 / 255)
        bounds.append(-log_mass + terms + num_codes)
        weights.append(math.exp(log_q))
        log_joints.append(log_mass - num_codes)
    assert sum(weights) == pytest.approx(1)
    exact = -torch.tensor(log_joints, dtype=torch.float64).logsumexp(0).item()
    expectation = sum(weight * bound for weight, bound in zip(weights, bounds, strict=True))
    assert expectation >= exact

    num_samples = 3000
    found = tokenizer.evidence_lower_bound(
        images.expand(num_samples, -1, -1, -1),
        decoder_variance=variance,
        generator=torch.Generator().manual_seed(0),
    )
    distances = (found.nats.unsqueeze(1) - torch.tensor(bounds, dtype=torch.float64)).abs()
    assert distances.amin(1).max() < 1e-8  # each is the bound of some codes
    margin = 4 * found.nats.std().item() / math.sqrt(num_samples) + 1e-9
    assert found.nats.mean().item() == pytest.approx(expectation, abs=margin)
    torch.testing.assert_close(found.bits_per_dim, found.nats / num_values / math.log(2))


def test_the_best_decoder_variance_is_the_mean_squared_error_of_the_images() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()

    def bound(variance: float | None) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return tokenizer.evidence_lower_bound(images, variance, generator).nats

    best = bound(None).mean()
    variances = [0.05 * step for step in range(1, 60)]
    nats = [bound(variance).mean() for variance in variances]
    assert best <= min(nats)
    assert best == pytest.approx(min(nats).item(), abs=1)


def test_the_bound_of_an_image_depends_on_that_image_alone_at_a_fixed_variance() -> None:
    # One code per layer: nothing to draw.
    tokenizer = make_tokenizer(hq_vae((8, 4), (2, 1), 1, 4, networks=NETWORKS)).eval()
    images = random_images(batch=3)
    together = tokenizer.evidence_lower_bound(images, 0.2).nats
    alone = [tokenizer.evidence_lower_bound(image.unsqueeze(0), 0.2).nats for image in images]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_bound_repeats_with_the_same_generator() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    first, second, third = (
        tokenizer.evidence_lower_bound(images, 0.2, torch.Generator().manual_seed(seed)).nats
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_log_posteriors_are_normalized_and_peak_at_the_nearest_codes() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    encoding = tokenizer.encode_with_latents(images)
    log_posteriors = tokenizer.log_posteriors(encoding.latents, encoding.indices)
    for group, indices in zip(log_posteriors, encoding.indices, strict=True):
        assert len(group) == indices.shape[1]
        for layer, log_posterior in enumerate(group):
            assert torch.equal(log_posterior.argmax(-1), indices[:, layer])
            torch.testing.assert_close(
                log_posterior.exp().sum(-1), torch.ones_like(log_posterior[..., 0])
            )


# Images to indices and back.


@settings(max_examples=12)
@given(
    channels=st.integers(1, 4),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    batch=st.integers(1, 2),
    depths=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    is_baseline=st.booleans(),
)
def test_shapes_follow_the_code_maps_for_any_size_and_channels(
    channels: int, rows: int, columns: int, batch: int, depths: tuple[int, int], is_baseline: bool
) -> None:
    config = hq_vae((8, 4), depths, 5, 3, networks=NETWORKS, channels=channels)
    torch.manual_seed(0)
    tokenizer = Tokenizer(deterministic(config) if is_baseline else config).eval()
    images = torch.rand(batch, channels, 8 * rows, 8 * columns)
    indices = tokenizer.encode(images)
    maps = tokenizer.code_maps(8 * rows, 8 * columns)
    vectors = tokenizer.code_vectors()
    for own, code_map, depth, factor, own_vectors in zip(
        indices, maps, depths, (1, 2), vectors, strict=True
    ):
        assert own.dtype == torch.int64
        assert own.shape == (batch, depth, rows * factor, columns * factor)
        assert own.shape == (batch, code_map.depth, code_map.height, code_map.width)
        assert code_map.code_dim == 3
        assert [tuple(entry.shape) for entry in own_vectors] == [(5, 3)] * depth
        assert not any(entry.requires_grad for entry in own_vectors)
    assert tokenizer.codebook_sizes == [5] * sum(depths)
    assert tokenizer.decode(indices).shape == images.shape
    assert tokenizer.reconstruct(images).shape == images.shape
    variances = tokenizer.dequantization_variances()
    assert len(variances) == (0 if is_baseline else sum(depths))


@BOTH_KINDS
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_decoding_what_was_encoded_is_reconstruction(
    config: TokenizerConfig, memory_format: torch.memory_format
) -> None:
    tokenizer = make_tokenizer(config).float().eval()
    for batch in (1, 3):
        images = random_images(batch=batch).float().to(memory_format=memory_format)
        decoded = tokenizer.decode(tokenizer.encode(images))
        assert torch.equal(decoded, tokenizer.reconstruct(images))


@BOTH_KINDS
def test_indices_of_a_batch_are_those_of_its_images(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config).eval(), random_images(batch=3)
    together = tokenizer.encode(images)
    for number in range(3):
        alone = tokenizer.encode(images[number : number + 1])
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[number : number + 1], second)


@settings(max_examples=10)
@given(log_s2=st.floats(-6, 6), initial=st.floats(0.1, 10))
def test_indices_depend_on_neither_variances_nor_temperature(log_s2: float, initial: float) -> None:
    # Fact 5.
    images = random_images()
    quantizer = HYBRID.quantizer.model_copy(update={"initial_temperature": initial})
    tokenizer = make_tokenizer(HYBRID.model_copy(update={"quantizer": quantizer}))
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if name.endswith("log_variances"):
                parameter.fill_(log_s2)
    for first, second in zip(
        tokenizer.encode(images), make_tokenizer().encode(images), strict=True
    ):
        assert torch.equal(first, second)


@BOTH_KINDS
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_progressive_decoding_ignores_the_later_layers(
    config: TokenizerConfig, num_layers: int
) -> None:
    tokenizer = make_tokenizer(config).eval()
    indices = tokenizer.encode(random_images())
    decoded = tokenizer.decode(indices, num_layers)
    changed = [entry.clone() for entry in indices]
    layers = [(group, layer) for group, depth in enumerate((2, 3)) for layer in range(depth)]
    for group, layer in layers[num_layers:]:
        changed[group][:, layer] = (changed[group][:, layer] + 1) % 6
    assert torch.equal(decoded, tokenizer.decode(changed, num_layers))
    group, layer = layers[num_layers - 1]
    changed[group][:, layer] = (changed[group][:, layer] + 1) % 6
    assert not torch.equal(decoded, tokenizer.decode(changed, num_layers))


@BOTH_KINDS
def test_progressive_decoding_ends_with_the_whole(config: TokenizerConfig) -> None:
    tokenizer = make_tokenizer(config).eval()
    indices = tokenizer.encode(random_images())
    assert torch.equal(tokenizer.decode(indices, 5), tokenizer.decode(indices))


def test_permuting_a_codebook_permutes_indices_and_leaves_images() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    permuted, order = make_tokenizer().eval(), torch.tensor([3, 0, 5, 1, 4, 2])
    for group in permuted.top_down:
        for codebook in group.quantizer.codebooks:
            codebook.data = codebook.data[order]
    found, expected = permuted.encode(images), tokenizer.encode(images)
    for first, second in zip(found, expected, strict=True):
        assert torch.equal(order[first], second)
    assert torch.equal(permuted.reconstruct(images), tokenizer.reconstruct(images))


# Codebooks.


def test_the_start_from_data_is_the_same_for_the_same_generator() -> None:
    images = random_images(batch=8)
    for config in (HYBRID, BASELINE):
        tokenizers = [make_tokenizer(config) for _ in range(3)]
        for tokenizer, seed in zip(tokenizers, (1, 1, 2), strict=True):
            tokenizer.initialize_from_data(images, torch.Generator().manual_seed(seed))
        hashes = [tokenizer.content_hash() for tokenizer in tokenizers]
        assert hashes[0] == hashes[1] != hashes[2]


def test_the_start_from_data_changes_codebooks_and_variances_alone() -> None:
    for config in (HYBRID, BASELINE):
        tokenizer = make_tokenizer(config)
        before = copy.deepcopy(tokenizer.state_dict())
        tokenizer.initialize_from_data(random_images(batch=8), torch.Generator().manual_seed(1))
        for name, tensor in tokenizer.state_dict().items():
            is_start = any(part in name for part in ("codebook", "log_variances", "mean_sum"))
            assert torch.equal(tensor, before[name]) == (not is_start), name


def test_a_baseline_moves_its_codebooks_by_its_training_steps_alone() -> None:
    images = random_images(batch=8)
    first, second = make_tokenizer(BASELINE), make_tokenizer(BASELINE)
    for tokenizer in (first, second):
        tokenizer.initialize_from_data(images, torch.Generator().manual_seed(1))
    first.encode(random_images(3))  # in training mode, and neither this
    first.reconstruct(random_images(3))
    first.eval()
    run(first, random_images(4))  # nor this counts
    first.train()
    for tokenizer in (first, second):
        before = tokenizer.content_hash()
        run(tokenizer, images)
        assert tokenizer.content_hash() == before
        torch.manual_seed(9)
        tokenizer.update_codebooks()
        assert tokenizer.content_hash() != before
    assert first.content_hash() == second.content_hash()


def test_updating_codebooks_leaves_a_stochastic_tokenizer_alone() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.content_hash()
    run(tokenizer, random_images())
    tokenizer.update_codebooks()
    assert tokenizer.content_hash() == before


def test_codebooks_and_variances_are_spared_weight_decay() -> None:
    tokenizer = make_tokenizer()
    spared = tokenizer.no_weight_decay()
    for name, _ in tokenizer.named_parameters():
        assert (name in spared) == (".quantizer." in name), name
    assert len(spared) == 5 + 2


def test_a_copy_is_equal_and_independent() -> None:
    for config in (HYBRID, BASELINE):
        tokenizer = make_tokenizer(config)
        run(tokenizer, random_images())
        copied = copy.deepcopy(tokenizer)
        assert copied.content_hash() == tokenizer.content_hash()
        with torch.no_grad():
            copied.code_vectors()[0][0].add_(1)
        assert copied.content_hash() != tokenizer.content_hash()


# What a caller can get wrong.


@pytest.mark.parametrize("call", ["encode", "reconstruct", "evidence_lower_bound"])
def test_a_size_that_the_coarsest_downsampling_does_not_divide_is_rejected(call: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match=r"image size .* downsampling 8, got 8 by 12"):
        getattr(tokenizer, call)(torch.zeros(1, 3, 8, 12).double())
    with pytest.raises(InputError, match="image size"):
        tokenizer.code_maps(0, 8)


def test_a_wrong_channel_count_is_rejected() -> None:
    with pytest.raises(InputError, match="images must have 3 channels, got 1"):
        make_tokenizer().encode(torch.zeros(1, 1, 8, 8).double())


@pytest.mark.parametrize("num_layers", [0, -1, 6])
def test_a_number_of_layers_that_is_not_there_is_rejected(num_layers: int) -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    with pytest.raises(InputError, match=f"num_layers must be from 1 to 5, got {num_layers}"):
        tokenizer.decode(indices, num_layers)


@pytest.mark.parametrize(
    ("group", "shape", "message"),
    [
        (0, (2, 3, 1, 2), r"indices\[0\] must have shape \(2, 2, 1, 2\)"),
        (1, (2, 3, 2, 5), r"indices\[1\] must have shape \(2, 3, 2, 4\)"),
        (1, (1, 3, 2, 4), r"indices\[1\] must have shape"),
        (0, (2, 1, 2), r"\(batch, depth, height, width\)"),
        (1, (2,), r"indices\[1\] must have shape"),
    ],
)
def test_indices_of_another_shape_are_rejected(
    group: int, shape: tuple[int, ...], message: str
) -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    indices[group] = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        tokenizer.decode(indices)


@pytest.mark.parametrize("value", [-1, 6])
def test_indices_out_of_range_are_rejected(value: int) -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    indices[1][0, 2, 1, 3] = value
    with pytest.raises(InputError, match=r"indices\[1\], layer \d, must lie in \[0, "):
        tokenizer.decode(indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int32])
def test_indices_of_another_type_are_rejected(dtype: torch.dtype) -> None:
    tokenizer = make_tokenizer()
    indices = [entry.to(dtype) for entry in tokenizer.encode(random_images())]
    with pytest.raises(InputError, match=r"indices\[0\] must be int64"):
        tokenizer.decode(indices)


def test_a_wrong_number_of_groups_is_rejected() -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    with pytest.raises(InputError, match="must hold 2 maps, got 1"):
        tokenizer.decode(indices[:1])


def test_training_without_a_planned_number_of_steps_is_rejected() -> None:
    tokenizer = make_tokenizer()
    tokenizer.total_steps = None
    with pytest.raises(InputError, match="total_steps must be set on the tokenizer"):
        tokenizer(random_images(), 0)
    assert Tokenizer(BASELINE).temperature(3) == 1


def test_a_baseline_has_neither_bound_nor_posterior() -> None:
    tokenizer, images = make_tokenizer(BASELINE), random_images()
    encoding = tokenizer.encode_with_latents(images)
    with pytest.raises(InputError, match="stochastic"):
        tokenizer.evidence_lower_bound(images)
    with pytest.raises(InputError, match="stochastic"):
        tokenizer.log_posteriors(encoding.latents, encoding.indices)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan])
def test_a_decoder_variance_that_is_not_positive_is_rejected(variance: float) -> None:
    with pytest.raises(InputError, match="decoder_variance must be > 0"):
        make_tokenizer().evidence_lower_bound(random_images(), variance)


# Golden numbers. A change here changes results or breaks checkpoints: say so in the change log.


def first_losses() -> list[float]:
    """Losses of five training steps of the tiny preset in float64, and of one evaluation."""
    tokenizer, images = make_tokenizer(TINY), random_images(batch=4, side=8)
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(tokenizer.parameters(), 1e-2)
    torch.manual_seed(3)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = tokenizer(images, step).loss
        (loss * 2 / images[0].numel()).backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, tokenizer.eval()(images, 5).loss.item()]


def test_the_first_losses_are_the_golden_ones() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert first_losses() == pytest.approx(golden["losses"], rel=1e-6)


@pytest.mark.parametrize("kind", ["stochastic", "nearest"])
def test_the_names_and_shapes_of_the_weights_are_the_golden_ones(kind: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    tokenizer = Tokenizer(TINY if kind == "stochastic" else deterministic(TINY))
    found = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert found == golden[f"{kind}_weights"]
