"""The tokenizer: round trips, the bound, errors, names of weights."""

import copy
import json
import math
from pathlib import Path

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
)
from tokenizer import (
    InputError,
    Tokenizer,
    TokenizerConfig,
    hq_vae,
    rsq_vae,
    sq_vae,
    sq_vae_2,
)
from tokenizer.builders import deterministic
from tokenizer.objective import discretized_code_length

TINY = hq_vae((8, 4), (2, 1), 8, 4, networks=NETWORKS)
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_tiny.json"
EVERY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
BOTH_TABLES = pytest.mark.parametrize("config", [HYBRID, BASELINE], ids=["stochastic", "nearest"])


# Terms.


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (rsq_vae(4, 1, 6, 4, networks=NETWORKS), sq_vae(4, 6, 4, networks=NETWORKS)),
        (sq_vae_2((4,), 6, 4, networks=NETWORKS), sq_vae(4, 6, 4, networks=NETWORKS)),
        (
            hq_vae((8, 4, 2), (1, 1, 1), 6, 4, networks=NETWORKS),
            sq_vae_2((8, 4, 2), 6, 4, networks=NETWORKS),
        ),
    ],
)
def test_members_that_have_one_layer_or_resolution_are_each_other(
    config: TokenizerConfig, other: TokenizerConfig
) -> None:
    # Fact 2.
    outputs = []
    for own in (config, other):
        tokenizer = make_tokenizer(own)
        torch.manual_seed(5)
        outputs.append(tokenizer(random_images(), 0.5))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert len(outputs[0].layer_entropy) == len(config.groups)


def test_commitment_alone_reaches_the_encoder_and_not_the_decoder() -> None:
    tokenizer = make_tokenizer(BASELINE)
    tokenizer(random_images()).latent_terms["commitment"].backward()
    for parameter in tokenizer.bottom_up.parameters():
        assert parameter.grad is not None
    for parameter in tokenizer.decoder.parameters():
        assert parameter.grad is None


@EVERY_KIND
def test_evaluation_knows_neither_noise_nor_temperature(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config).eval(), random_images()
    first, second = tokenizer(images), tokenizer(images, 0.1)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(first.reconstructions, tokenizer.reconstruct(images))


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
        latents = group.to_latents(joint)
        rest, variances = latents.movedim(1, -1), group.quantizer.log_variances.exp()
        for layer, s2 in enumerate(variances):
            codebook, k = group.quantizer.codebook(layer), chosen[:, layer]
            logits = -(rest.unsqueeze(-2) - codebook).square().sum(-1) / (2 * s2)  # (N, H, W, K)
            log_posterior = logits - logits.logsumexp(-1, keepdim=True)
            log_q = log_q + log_posterior.gather(-1, k.unsqueeze(-1)).sum((1, 2, 3))
            terms = terms + (log_posterior.exp() * log_posterior).sum((1, 2, 3))
            rest = rest - codebook[k]
        quantized = latents - rest.movedim(-1, 1)
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
    found = tokenizer.evidence_lower_bound(
        images.expand(num_samples, -1, -1, -1),
        decoder_variance=variance,
        generator=seeded(0),
    )
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

    def bound(variance: float | None) -> Tensor:
        generator = seeded(0)
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


# Images to indices and back.


@settings(max_examples=15)
@given(
    channels=st.integers(1, 4),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    batch=st.integers(1, 2),
    depths=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_shapes_follow_the_code_maps_for_any_size_and_channels(
    channels: int, rows: int, columns: int, batch: int, depths: tuple[int, int], kind: str
) -> None:
    config = hq_vae((8, 4), depths, 6, 3, networks=NETWORKS, channels=channels)
    torch.manual_seed(0)
    config = config.model_copy(update={"quantizer": KINDS[kind].quantizer})
    tokenizer = Tokenizer(config).eval()
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
        assert [tuple(entry.shape) for entry in own_vectors] == [(6, 3)] * depth
        assert not any(entry.requires_grad for entry in own_vectors)
    assert tokenizer.codebook_sizes == [6] * sum(depths)
    assert tokenizer.decode(indices).shape == images.shape
    assert tokenizer.has_posterior == config.has_posterior == (kind == "stochastic")
    num_variances = sum(depths) if kind == "stochastic" else 0
    assert len(tokenizer.dequantization_variances()) == num_variances


@EVERY_KIND
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_decoding_what_was_encoded_is_reconstruction_to_the_last_bit(
    config: TokenizerConfig, memory_format: torch.memory_format
) -> None:
    tokenizer = make_tokenizer(config).float().eval()
    for batch in (1, 3):
        images = random_images(batch=batch).float().to(memory_format=memory_format)
        decoded = tokenizer.decode(tokenizer.encode(images))
        assert torch.equal(decoded, tokenizer.reconstruct(images))


@EVERY_KIND
def test_indices_of_a_batch_are_those_of_its_images(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config).eval(), random_images(batch=3)
    together = tokenizer.encode(images)
    for number in range(3):
        alone = tokenizer.encode(images[number : number + 1])
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[number : number + 1], second)


@BOTH_TABLES
def test_permuting_codebooks_permutes_indices_and_leaves_images(config: TokenizerConfig) -> None:
    tokenizer, images = make_tokenizer(config).eval(), random_images()
    permuted, order = make_tokenizer(config).eval(), torch.tensor([3, 0, 5, 1, 4, 2])
    for group in permuted.code_vectors():
        for codebook in group:
            codebook.copy_(codebook[order])
    for first, second in zip(permuted.encode(images), tokenizer.encode(images), strict=True):
        assert torch.equal(order[first], second)
    assert torch.equal(permuted.reconstruct(images), tokenizer.reconstruct(images))


# Codebooks.


@BOTH_TABLES
def test_the_start_from_data_changes_codebooks_and_variances_alone_by_its_generator(
    config: TokenizerConfig,
) -> None:
    tokenizers = [make_tokenizer(config) for _ in range(3)]
    before = copy.deepcopy(tokenizers[0].state_dict())
    for tokenizer, seed in zip(tokenizers, (1, 1, 2), strict=True):
        tokenizer.initialize_from_data(random_images(batch=8), seeded(seed))
    for name, tensor in tokenizers[0].state_dict().items():
        is_start = any(part in name for part in ("codebook", "log_variances", "mean_sum"))
        assert torch.equal(tensor, before[name]) == (not is_start), name
    hashes = [tokenizer.content_hash() for tokenizer in tokenizers]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_baseline_moves_its_codebooks_by_its_training_steps_alone() -> None:
    images = random_images(batch=8)
    first, second = make_tokenizer(BASELINE), make_tokenizer(BASELINE)
    for tokenizer in (first, second):
        tokenizer.initialize_from_data(images, seeded(1))
    first.encode(random_images(3))  # in training mode, and neither this
    first.reconstruct(random_images(3))
    first.eval()
    first(random_images(4))  # nor this counts
    first.train()
    for tokenizer in (first, second):
        before = tokenizer.content_hash()
        tokenizer(images)
        assert tokenizer.content_hash() == before
        torch.manual_seed(9)
        tokenizer.after_step()
        assert tokenizer.content_hash() != before
    assert first.content_hash() == second.content_hash()


def test_codebooks_and_variances_are_spared_weight_decay() -> None:
    tokenizer = make_tokenizer()
    roles = tokenizer.learned_roles()
    assert roles.keys() == tokenizer.no_weight_decay()
    for name, _ in tokenizer.named_parameters():
        role = "codebook" if ".codebooks." in name else "variance" if "variances" in name else None
        assert roles.get(name) == role, name
    assert len(roles) == 5 + 2


@EVERY_KIND
def test_a_copy_is_equal_and_independent(config: TokenizerConfig) -> None:
    tokenizer = make_tokenizer(config)
    tokenizer(random_images())
    copied = copy.deepcopy(tokenizer)
    assert copied.content_hash() == tokenizer.content_hash()
    with torch.no_grad():
        for tensor in copied.quantizers[0].state_dict().values():
            tensor.add_(1)
    assert copied.content_hash() != tokenizer.content_hash()


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


@pytest.mark.parametrize(
    ("group", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 1, 2), r"indices\[0\] must have shape \(2, 2, 1, 2\)"),
        (1, torch.zeros(2, 3, 2, 5), r"indices\[1\] must have shape \(2, 3, 2, 4\)"),
        (1, torch.zeros(1, 3, 2, 4), r"indices\[1\] must have shape"),
        (0, torch.zeros(2, 1, 2), r"\(batch, depth, height, width\)"),
        (1, torch.zeros(2), r"indices\[1\] must have shape"),
        (1, torch.full((2, 3, 2, 4), -1), r"indices\[1\], layer 0, must lie in \[0, 6\), got -1"),
        (1, torch.full((2, 3, 2, 4), 6), r"indices\[1\], layer 0, must lie in \[0, 6\), got 6"),
    ],
)
def test_indices_that_do_not_fit_are_rejected(group: int, wrong: Tensor, message: str) -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    indices[group] = wrong.long()
    with pytest.raises(InputError, match=message):
        tokenizer.decode(indices)


def test_indices_of_another_type_or_number_and_layers_that_are_not_there_are_rejected() -> None:
    tokenizer = make_tokenizer()
    indices = tokenizer.encode(random_images())
    for dtype in (torch.uint8, torch.float32, torch.int32):
        with pytest.raises(InputError, match=r"indices\[0\] must be int64"):
            tokenizer.decode([entry.to(dtype) for entry in indices])
    with pytest.raises(InputError, match="must hold 2 maps, got 1"):
        tokenizer.decode(indices[:1])
    for num_layers in (0, -1, 6):
        with pytest.raises(InputError, match=f"num_layers must be from 1 to 5, got {num_layers}"):
            tokenizer.decode(indices, num_layers)


@pytest.mark.parametrize("kind", ["nearest", "fsq"])
def test_without_a_posterior_the_bound_is_that_of_the_nearest_codes(kind: str) -> None:
    tokenizer, images = make_tokenizer(KINDS[kind]), random_images()
    encoding = tokenizer.encode_with_latents(images)
    with pytest.raises(InputError, match=r"quantizer must have a posterior .* stochastic"):
        tokenizer.evidence_lower_bound(images)
    assert tokenizer.evidence_lower_bound(images, codes="nearest").nats.isfinite().all()
    with pytest.raises(InputError, match="has no posterior over its codes"):
        tokenizer.log_posteriors(encoding.latents, encoding.indices)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan])
def test_a_decoder_variance_that_is_not_positive_is_rejected(variance: float) -> None:
    with pytest.raises(InputError, match="decoder_variance must be > 0"):
        make_tokenizer().evidence_lower_bound(random_images(), variance)


# Golden. A change here breaks checkpoints: say so in the change log.


@pytest.mark.parametrize("kind", ["stochastic", "nearest"])
def test_the_names_and_shapes_of_the_weights_are_the_golden_ones(kind: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    tokenizer = Tokenizer(TINY if kind == "stochastic" else deterministic(TINY))
    found = {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert found == golden[f"{kind}_weights"]
