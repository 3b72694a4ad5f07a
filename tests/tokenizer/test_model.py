"""The tokenizer: round trips, the bound, errors, names of weights."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenizer.tiny import (
    BASELINE,
    HYBRID,
    KINDS,
    NETWORKS,
    make_tokenizer,
    random_images,
    seeded,
    summed_codes,
)
from tokenizer import InputError, Tokenizer, TokenizerConfig, hq_vae, rsq_vae, sq_vae
from tokenizer.config import NetworkConfig
from tokenizer.objective import discretized_code_length

EVERY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def test_commitment_alone_reaches_the_encoder_and_not_the_decoder() -> None:
    tokenizer = make_tokenizer(BASELINE)
    tokenizer(random_images()).latent_terms["commitment"].backward()
    assert all(own.grad is not None for own in tokenizer.bottom_up.parameters())
    assert all(own.grad is None for own in tokenizer.decoder.parameters())


# The evidence lower bound.


def enumerate_codes(tokenizer: Tokenizer, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """All codes of an image, log Q(codes | image), and minus the entropies met on the way."""
    maps = tokenizer.code_maps(*image.shape[2:])
    shapes = [(code_map.depth, code_map.height, code_map.width) for code_map in maps]
    sizes = [
        torch.arange(size)
        for code_map, (_, height, width) in zip(maps, shapes, strict=True)
        for size in code_map.codebook_sizes
        for _ in range(height * width)
    ]
    codes = torch.cartesian_prod(*sizes).split([math.prod(shape) for shape in shapes], 1)
    indices = [own.reshape(-1, *shape) for own, shape in zip(codes, shapes, strict=True)]
    log_q, terms, state = torch.zeros(()), torch.zeros(()), None
    features = tokenizer.bottom_up(image.expand(len(indices[0]), -1, -1, -1))
    for group, chosen, inputs in zip(tokenizer.top_down, indices, features, strict=True):
        upsampled = None if state is None else group.up(state)
        joint = inputs if upsampled is None else torch.cat([upsampled, inputs], 1)
        posteriors = group.quantizer.log_posteriors(group.to_latents(joint), chosen)
        for log_posterior, k in zip(posteriors, chosen.unsqueeze(-1).unbind(1), strict=True):
            log_q = log_q + log_posterior.gather(-1, k).sum((1, 2, 3))
            terms = terms + (log_posterior.exp() * log_posterior).sum((1, 2, 3))
        quantized = summed_codes(group.quantizer, chosen)
        state = quantized if upsampled is None else upsampled + quantized
    return indices, log_q, terms


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
    images = torch.randint(256, (1, 1, *size)).double() / 127.5 - 1
    num_values, variance = images.numel(), 0.3
    indices, log_q, terms = enumerate_codes(tokenizer, images)
    # The logarithm of the number of all codes; their prior is uniform.
    num_codes = math.log(len(log_q))
    log_mass = -discretized_code_length(
        images.expand(len(log_q), -1, -1, -1), tokenizer.decode(indices), variance
    )
    bounds = -log_mass + terms + num_codes
    assert log_q.exp().sum().item() == pytest.approx(1)
    exact = -(log_mass - num_codes).logsumexp(0).item()
    expectation = (log_q.exp() * bounds).sum().item()
    assert expectation >= exact

    num_samples = 3000
    samples = images.expand(num_samples, -1, -1, -1)
    found = tokenizer.evidence_lower_bound(samples, variance, seeded(0))
    distances = (found.nats.unsqueeze(1) - bounds).abs()
    assert distances.amin(1).max() < 1e-8  # each is the bound of some codes
    margin = 4 * found.nats.std().item() / math.sqrt(num_samples) + 1e-9
    assert found.nats.mean().item() == pytest.approx(expectation, abs=margin)
    torch.testing.assert_close(found.bits_per_dim, found.nats / num_values / math.log(2))
    # A point mass at the nearest codes gives a bound of the same likelihood.
    nearest = tokenizer.evidence_lower_bound(images, variance, codes="nearest").nats.item()
    assert nearest >= exact
    assert (bounds - terms - nearest).abs().min() < 1e-8


def test_the_best_decoder_variance_is_the_mean_squared_error_of_the_images() -> None:
    tokenizer, images = make_tokenizer().eval(), random_images()
    best, *others = (
        tokenizer.evidence_lower_bound(images, variance, seeded(0)).nats.mean().item()
        for variance in (None, *(0.05 * step for step in range(1, 60)))
    )
    assert best <= min(others)
    assert best == pytest.approx(min(others), abs=1)


def test_the_bound_of_an_image_depends_on_that_image_alone_at_a_fixed_variance() -> None:
    # One code per layer: nothing to draw.
    tokenizer = make_tokenizer(hq_vae((8, 4), (2, 1), 1, 4, networks=NETWORKS)).eval()
    images = random_images(batch=3)
    together = tokenizer.evidence_lower_bound(images, 0.2).nats
    alone = [tokenizer.evidence_lower_bound(image.unsqueeze(0), 0.2).nats for image in images]
    torch.testing.assert_close(together, torch.cat(alone))


# Images to indices and back.


@settings(max_examples=25)
@given(
    channels=st.integers(1, 4),
    patch_power=st.integers(0, 2),
    powers=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    depths=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_shapes_follow_the_code_maps_for_any_size_downsamplings_and_channels(
    channels: int,
    patch_power: int,
    powers: list[int],
    rows: int,
    columns: int,
    depths: list[int],
    kind: str,
) -> None:
    downsamplings = [2 ** (patch_power + power) for power in sorted(powers, reverse=True)]
    networks = NetworkConfig(patch_size=2**patch_power, width=4, max_width=8, num_blocks=1)
    depths = depths[: len(downsamplings)]
    config = hq_vae(downsamplings, depths, 6, 3, networks=networks, channels=channels)
    config = config.model_copy(update={"quantizer": KINDS[kind].quantizer})
    tokenizer = Tokenizer(config).eval()
    height, width = rows * downsamplings[0], columns * downsamplings[0]
    images = torch.rand(2, channels, height, width)
    indices, maps = tokenizer.encode(images), tokenizer.code_maps(height, width)
    groups = zip(indices, maps, depths, downsamplings, tokenizer.code_vectors(), strict=True)
    for found, code_map, depth, factor, vectors in groups:
        assert found.dtype == torch.int64
        assert found.shape == (2, depth, height // factor, width // factor)
        assert found.shape == (2, code_map.depth, code_map.height, code_map.width)
        assert code_map.code_dim == 3
        assert [tuple(entry.shape) for entry in vectors] == [(6, 3)] * depth
        assert not any(entry.requires_grad for entry in vectors)
    assert tokenizer.codebook_sizes == [6] * sum(depths)
    assert tokenizer.decode(indices).shape == images.shape
    assert tokenizer.has_posterior == config.has_posterior == (kind == "stochastic")
    num_variances = sum(depths) if kind == "stochastic" else 0
    assert len(tokenizer.dequantization_variances()) == num_variances


@EVERY_KIND
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation_is_decoding_the_codes_of_each_image_to_the_last_bit_without_noise(
    config: TokenizerConfig, memory_format: torch.memory_format
) -> None:
    tokenizer = make_tokenizer(config).float().eval()
    images = random_images(batch=3).float().to(memory_format=memory_format)
    indices, reconstructions = tokenizer.encode(images), tokenizer.reconstruct(images)
    assert torch.equal(tokenizer.decode(indices), reconstructions)
    output = tokenizer(images, 0.1)
    assert torch.equal(output.reconstructions, reconstructions)
    torch.testing.assert_close(output, tokenizer(images), rtol=0, atol=0)
    alone = [tokenizer.encode(image.unsqueeze(0)) for image in images]
    for together, parts in zip(indices, zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


# Codebooks.


@pytest.mark.parametrize("config", [HYBRID, BASELINE], ids=["stochastic", "nearest"])
def test_the_start_from_data_changes_codebooks_and_variances_alone(config: TokenizerConfig) -> None:
    tokenizer = make_tokenizer(config)
    before = copy.deepcopy(tokenizer.state_dict())
    tokenizer.initialize_from_data(random_images(batch=8), seeded(1))
    for name, tensor in tokenizer.state_dict().items():
        is_start = any(part in name for part in ("codebook", "log_variances", "mean_sum"))
        assert torch.equal(tensor, before[name]) == (not is_start), name


def test_codebooks_and_variances_are_spared_weight_decay() -> None:
    tokenizer = make_tokenizer()
    roles = tokenizer.learned_roles()
    assert roles.keys() == tokenizer.no_weight_decay()
    for name, _ in tokenizer.named_parameters():
        role = "codebook" if ".codebooks." in name else "variance" if "variances" in name else None
        assert roles.get(name) == role, name
    assert len(roles) == 5 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_KIND
def test_weights_of_16_bits_quantize_in_float32(
    config: TokenizerConfig, dtype: torch.dtype
) -> None:
    whole, cast = make_tokenizer(config).float().eval(), make_tokenizer(config).to(dtype).eval()
    images = random_images(batch=8)
    indices, latents = cast.encode_with_latents(images)
    assert {own.dtype for own in cast.parameters()} == {own.dtype for own in latents} == {dtype}
    reconstructions = cast.reconstruct(images)
    assert reconstructions.dtype == torch.float32
    assert torch.equal(cast.decode(indices), reconstructions)
    torch.testing.assert_close(reconstructions, whole.decode(indices), rtol=0.05, atol=0.05)
    for own, other in zip(indices, whole.encode(images), strict=True):
        assert (own == other).double().mean() > 0.8


# What a caller can get wrong.


@pytest.mark.parametrize("call", ["__call__", "encode", "reconstruct", "evidence_lower_bound"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 12).double(), "image size .* downsampling 8, got 8 by 12"),
        (torch.zeros(1, 3, 0, 8).double(), "image size .* got 0 by 8"),
        (torch.zeros(1, 1, 8, 8).double(), "images must have 3 channels, got 1"),
    ],
)
def test_images_that_do_not_fit_are_rejected(call: str, images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(make_tokenizer(), call)(images)


FED: dict[str, tuple[Any, str]] = {
    "NaN": (torch.full((1, 3, 8, 8), math.nan), r"lie on \[-1, 1\], got values from nan"),
    "infinite": (torch.full((1, 3, 8, 8), -math.inf), r"lie on \[-1, 1\], got values from -inf"),
    "0 to 255": (255 * torch.rand(1, 3, 8, 8), r"on \[-1, 1\], .* images / 127\.5 - 1"),
    "bytes": (torch.zeros(1, 3, 8, 8).byte(), r"floating point .*uint8: .*images / 127\.5 - 1"),
    "one image": (torch.zeros(3, 8, 8), r"must have the shape \(batch, .*, got \(3, 8, 8\)"),
    "video": (
        torch.zeros(1, 1, 3, 8, 8),
        r"must have the shape \(batch, .*, got \(1, 1, 3, 8, 8\)",
    ),
    "none": (torch.zeros(0, 3, 8, 8), r"hold at least one, got \(0, 3, 8, 8\)"),
    "numpy": (np.zeros((1, 3, 8, 8), np.float32), r"must be a torch\.Tensor .* got ndarray"),
}


@pytest.mark.parametrize("call", ["encode", "reconstruct", "evidence_lower_bound"])
@pytest.mark.parametrize("kind", FED)
@torch.no_grad()
def test_what_are_no_images_on_minus_one_to_one_is_refused_on_one_line(
    call: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, message = FED[kind]
    tokenizer = make_tokenizer().eval()
    encode = inspect.unwrap(Tokenizer.encode_with_latents)  # without the tests' type checker
    monkeypatch.setattr(Tokenizer, "encode_with_latents", encode)
    with pytest.raises(InputError, match=message) as caught:
        inspect.unwrap(getattr(Tokenizer, call))(tokenizer, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indices", [np.zeros((1, 2, 1, 1)), [np.zeros((1, 2, 1, 1))], "ab", 3])
@torch.no_grad()
def test_what_are_no_lists_of_indices_is_refused_on_one_line(indices: Any) -> None:
    with pytest.raises(InputError, match=r"^indices must be a list of int64 tensors .* got"):
        inspect.unwrap(Tokenizer.decode)(make_tokenizer(), indices)


def test_images_of_any_floating_type_are_meant_and_those_on_zero_to_one_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer, images = make_tokenizer().float().eval(), random_images().half()
    expected = tokenizer.encode(images.float())
    for dtype in (torch.float64, torch.float16):
        for found, other in zip(tokenizer.encode(images.to(dtype)), expected, strict=True):
            assert torch.equal(found, other)
    assert not caplog.records
    tokenizer.encode((images.float() + 1) / 2)
    assert "if they are on [0, 1], give 2 * images - 1" in caplog.text


@pytest.mark.parametrize(
    ("group", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 1, 2), r"indices\[0\] must have shape \(2, 2, 1, 2\)"),
        (1, torch.zeros(2, 3, 2, 5), r"indices\[1\] must have shape \(2, 3, 2, 4\)"),
        (1, torch.zeros(1, 3, 2, 4), r"indices\[1\] must have shape"),
        (0, torch.zeros(2, 1, 2), r"\(batch, depth, height, width\)"),
        (1, torch.zeros(2), r"indices\[1\] must have shape"),
        (1, torch.full((2, 3, 2, 4), -1), r"indices\[1\]\[:, 0\] must lie in \[0, 6\), got -1"),
        (1, torch.full((2, 3, 2, 4), 6), r"indices\[1\]\[:, 0\] must lie in \[0, 6\), got 6"),
    ],
)
def test_indices_that_do_not_fit_are_rejected(group: int, wrong: Tensor, message: str) -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    indices[group] = wrong.long()
    with pytest.raises(InputError, match=message):
        tokenizer.decode(indices)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda own, maps: own.decode(maps[:1]), "must hold 2 maps, got 1"),
        *(
            (lambda own, maps, n=n: own.decode(maps, n), f"num_layers must be from 1 to 5, got {n}")
            for n in (0, -1, 6)
        ),
        *(
            (lambda own, maps, t=t: own.decode([maps[0].to(t), maps[1]]), r"\[0\] must be int64")
            for t in (torch.uint8, torch.float32, torch.int32)
        ),
        *(
            (
                lambda own, _, s2=s2: own.evidence_lower_bound(random_images(), s2),
                "decoder_variance must be a finite number > 0",
            )
            for s2 in (0.0, -1.0, math.nan, math.inf)
        ),
    ],
)
def test_arguments_out_of_range_are_rejected(call: Callable[..., object], message: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match=message):
        call(tokenizer, tokenizer.encode(random_images()))


@pytest.mark.parametrize("kind", ["nearest", "fsq"])
def test_without_a_posterior_the_bound_is_that_of_the_nearest_codes(kind: str) -> None:
    tokenizer, images = make_tokenizer(KINDS[kind]), random_images()
    encoding = tokenizer.encode_with_latents(images)
    with pytest.raises(InputError, match=r"quantizer must have a posterior .* stochastic"):
        tokenizer.evidence_lower_bound(images)
    assert tokenizer.evidence_lower_bound(images, codes="nearest").nats.isfinite().all()
    with pytest.raises(InputError, match="has no posterior over its codes"):
        tokenizer.log_posteriors(encoding.latents, encoding.indices)


@EVERY_KIND
def test_all_but_the_decoder_identifies_a_tokenizer(config: TokenizerConfig) -> None:
    tokenizer = make_tokenizer(config)
    identity = tokenizer.identity_hash()
    for name, weight in tokenizer.state_dict().items():
        before = weight.clone()
        weight.add_(1)
        assert (tokenizer.identity_hash() == identity) == name.startswith("decoder."), name
        weight.copy_(before)
