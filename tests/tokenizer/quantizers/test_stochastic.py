"""Stochastic quantization against slow literal references, and its laws."""

import contextlib
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from tests.tokenizer.tiny import group_of, random_latents, seeded
from tokenizer.quantizers import QuantizerOutput, StochasticQuantizer, StochasticQuantizerConfig
from tokenizer.quantizers.base import Mode, full_precision
from tokenizer.storage.errors import InputError

SEEDS = st.integers(0, 10_000)
MODES: tuple[Mode, ...] = ("mixture", "sample", "nearest")


def make_quantizer(
    sizes: tuple[int, ...] = (5, 4, 3),
    dim: int = 3,
    seed: int = 0,
    shares_codebook: bool = False,
) -> StochasticQuantizer:
    """A float64 quantizer whose layers differ in s²."""
    torch.manual_seed(seed)
    group = group_of(sizes, dim, shares_codebook)
    quantizer = StochasticQuantizer(group, StochasticQuantizerConfig()).double()
    with torch.no_grad():
        quantizer.log_variances.copy_(torch.linspace(-0.7, 0.9, len(sizes)))
    return quantizer


def latent_terms(output: QuantizerOutput) -> Tensor:
    return output.latent_terms["quantization_error"] - output.posterior_entropy.sum(1)


class Literal(NamedTuple):
    """A group by its formulas, all layers over whole matrices in float64."""

    errors: Tensor
    entropies: Tensor
    quantized: Tensor
    indices: Tensor
    posteriors: list[Tensor]


def literal_group(
    quantizer: StochasticQuantizer, latents: Tensor, mode: Mode, temperature: float, seed: int
) -> Literal:
    rest, generator = latents.movedim(1, -1), seeded(seed)  # (B, H, W, D)
    variances = quantizer.log_variances.exp()
    entropies, indices, posteriors = [], [], []
    for layer, s2 in enumerate(variances):
        codebook = quantizer.codebook(layer)
        distances = ((rest.unsqueeze(-2) - codebook) ** 2).sum(-1)  # (B, H, W, K)
        posterior = (-distances / (2 * s2)).softmax(-1)  # softmax_k(-‖ẑ - b_k‖² / 2s²)
        scores, entropy = -distances, torch.zeros_like(distances)
        if mode != "nearest":
            noise = seeded(int(torch.randint(2**62, (), generator=generator)))
            uniform = torch.empty_like(posterior).uniform_(2**-25, 1, generator=noise)
            scores = posterior.log() - (-uniform.log()).log()
            entropy = -posterior * posterior.log()
        weights = one_hot(scores.argmax(-1), len(codebook)).double()
        if mode == "mixture":
            weights = (scores / temperature).softmax(-1)
        entropies.append(entropy.sum((1, 2, 3)))
        indices.append(scores.argmax(-1))
        posteriors.append(posterior)
        rest = rest - torch.einsum("bhwk,kd->bhwd", weights, codebook)
    errors = (rest**2).sum((1, 2, 3)) / (2 * variances.sum())
    return Literal(
        errors,
        torch.stack(entropies, 1),
        latents - rest.movedim(-1, 1),
        torch.stack(indices, 1),
        posteriors,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shares_codebook", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_group_equals_the_literal_formulas(
    mode: Mode, shares_codebook: bool, num_layers: int
) -> None:
    sizes = (5,) * num_layers if shares_codebook else (5, 4, 3)[:num_layers]
    quantizer = make_quantizer(sizes, shares_codebook=shares_codebook)
    latents = random_latents()
    output = quantizer(latents, mode, 0.7, seeded())
    literal = literal_group(quantizer, latents, mode, 0.7, 7)
    assert torch.equal(output.indices, literal.indices)
    exactly = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(
        dict(output.latent_terms), {"quantization_error": literal.errors}, **exactly
    )
    torch.testing.assert_close(output.posterior_entropy, literal.entropies, **exactly)
    torch.testing.assert_close(output.quantized, literal.quantized, **exactly)
    if mode != "mixture":  # the posteriors follow hard codes of the layers before
        log_posteriors = quantizer.log_posteriors(latents, output.indices)
        torch.testing.assert_close([own.exp() for own in log_posteriors], literal.posteriors)


# The facts of the method, by number.


@settings(max_examples=25)
@given(seed=SEEDS, size=st.integers(1, 7), dim=st.integers(1, 4), log_s2=st.floats(-3, 3))
def test_the_expected_latent_terms_are_minus_the_log_of_the_summed_kernels(
    seed: int, size: int, dim: int, log_s2: float
) -> None:
    # Fact 1, by the exact expectation over k.
    quantizer = make_quantizer((size,), dim, seed)
    with torch.no_grad():
        quantizer.log_variances.fill_(log_s2)
    latents = random_latents(dim, seed + 1, batch=1, side=1)[..., :1]
    (log_posterior,) = quantizer.log_posteriors(latents, torch.zeros(1, 1, 1, 1).long())
    entropy = quantizer(latents, "sample", 1.0, seeded(seed)).posterior_entropy.item()
    distances = (latents.flatten() - quantizer.codebook(0)).square().sum(1) / (2 * math.exp(log_s2))
    expected = (log_posterior.exp().flatten() * distances).sum().item()
    kernels = (-distances).logsumexp(0).item()
    assert expected - entropy == pytest.approx(-kernels, rel=1e-9, abs=1e-9)


def test_codes_are_drawn_as_often_as_the_posterior_says() -> None:
    quantizer = make_quantizer((5,), 2)
    latents = (
        torch.tensor([0.3, -0.5], dtype=torch.float64).view(1, 2, 1, 1).expand(20_000, 2, 1, 1)
    )
    for mode in ("sample", "mixture"):
        indices = quantizer(latents, mode, 0.5, seeded()).indices
        counts = torch.bincount(indices.flatten(), minlength=5).double()
        posterior = quantizer.log_posteriors(latents[:1], indices[:1])[0].exp().flatten()
        expected = 20_000 * posterior
        chi_square = ((counts - expected).square() / expected).sum().item()
        assert chi_square < 18.5  # 99.9 % quantile at 4 degrees of freedom


@settings(max_examples=25)
@given(seed=SEEDS, log_scale=st.floats(-2, 2), temperature=st.floats(0.1, 2))
def test_scaling_latents_codes_and_deviation_leaves_posterior_and_terms(
    seed: int, log_scale: float, temperature: float
) -> None:
    # Fact 3.
    scale = math.exp(log_scale)
    quantizer, scaled = make_quantizer(seed=seed), make_quantizer(seed=seed)
    with torch.no_grad():
        for codebook in scaled.codebooks:
            codebook.mul_(scale)
        scaled.log_variances.add_(2 * log_scale)
    latents = random_latents(seed=seed)
    for mode in MODES:
        plain = quantizer(latents, mode, temperature, seeded(seed))
        output = scaled(scale * latents, mode, temperature, seeded(seed))
        assert torch.equal(plain.indices, output.indices)
        torch.testing.assert_close(dict(output.latent_terms), dict(plain.latent_terms))
        torch.testing.assert_close(output.posterior_entropy, plain.posterior_entropy)
        torch.testing.assert_close(output.quantized, scale * plain.quantized)
    for first, second in zip(
        quantizer.log_posteriors(latents, plain.indices),
        scaled.log_posteriors(scale * latents, plain.indices),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


@settings(max_examples=25)
@given(seed=SEEDS, log_s2=st.floats(-3, 3))
def test_the_latent_terms_always_fall_as_a_variance_grows(seed: int, log_s2: float) -> None:
    # Fact 4, for hard samples: each s² of a group, by its exact gradient. Of the expectation
    # over k it follows from fact 1.
    quantizer = make_quantizer(seed=seed)
    with torch.no_grad():
        quantizer.log_variances.add_(log_s2)
    latent_terms(quantizer(random_latents(seed=seed), "sample", 1.0, seeded(seed))).sum().backward()
    assert quantizer.log_variances.grad is not None
    assert (quantizer.log_variances.grad < 0).all()


@settings(max_examples=25)
@given(
    seed=SEEDS,
    log_s2=st.lists(st.floats(-8, 8), min_size=3, max_size=3),
    temperature=st.floats(1e-3, 50),
)
def test_hard_indices_depend_on_neither_variance_nor_temperature(
    seed: int, log_s2: list[float], temperature: float
) -> None:
    # Fact 5.
    quantizer, latents = make_quantizer(seed=seed), random_latents(seed=seed)
    expected = quantizer(latents, "nearest")
    with torch.no_grad():
        quantizer.log_variances.copy_(torch.tensor(log_s2))
    output = quantizer(latents, "nearest", temperature, seeded(seed))
    assert torch.equal(output.indices, expected.indices)
    assert torch.equal(output.quantized, expected.quantized)


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_every_code_and_variance_of_every_layer_gets_a_gradient(shares_codebook: bool) -> None:
    # Fact 6: of the last residual layer too, from each of the two terms and from the output.
    quantizer = make_quantizer((4, 4, 4), shares_codebook=shares_codebook)
    latents = random_latents().requires_grad_()
    output = quantizer(latents, "mixture", 0.7, seeded())
    inputs = [quantizer.log_variances, *quantizer.codebooks, latents]
    assert len(inputs) == len(list(quantizer.parameters())) + 1
    (error,) = output.latent_terms.values()
    for term in (error, output.posterior_entropy, output.quantized.square()):
        for gradient in torch.autograd.grad(term.sum(), inputs, retain_graph=True):
            assert (gradient != 0).any()
    variances, *codebooks, _ = torch.autograd.grad(latent_terms(output).sum(), inputs)
    assert all((gradient.abs().sum(1) > 0).all() for gradient in codebooks)
    assert (variances != 0).all()


@settings(max_examples=25)
@given(seed=SEEDS, size=st.integers(1, 9), log_s2=st.floats(-6, 6))
def test_the_posterior_entropy_lies_between_zero_and_log_k(
    seed: int, size: int, log_s2: float
) -> None:
    # Fact 7.
    quantizer = make_quantizer((size, 2 * size), seed=seed)
    with torch.no_grad():
        quantizer.log_variances.fill_(log_s2)
    entropy = quantizer(random_latents(seed=seed), "mixture", 1.0, seeded()).posterior_entropy
    limits = 6 * torch.tensor([size, 2 * size], dtype=torch.float64).log()
    assert (entropy >= -1e-12).all()
    assert (entropy <= limits + 1e-9).all()


# The pitfalls of the method.


def test_residuals_are_not_detached() -> None:
    quantizer = make_quantizer()
    output = quantizer(random_latents(), "mixture", 0.7, seeded())
    for later, earlier in ((1, 0), (2, 0), (2, 1)):
        entropy = output.posterior_entropy[:, later].sum()
        codebook = quantizer.codebook(earlier)
        (gradient,) = torch.autograd.grad(entropy, codebook, retain_graph=True)
        assert (gradient != 0).any()


def test_a_mixture_approaches_its_heaviest_code_as_the_temperature_falls() -> None:
    quantizer, latents = make_quantizer(), random_latents()
    mixture = quantizer(latents, "mixture", 1e-4, seeded())
    sample = quantizer(latents, "sample", 1.0, seeded())
    assert torch.equal(mixture.indices, sample.indices)
    torch.testing.assert_close(mixture.quantized, sample.quantized)


@pytest.mark.parametrize("before", [False, True])
def test_tf32_is_off_inside_and_as_before_outside(before: bool) -> None:
    original = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = before
        with contextlib.suppress(KeyError), full_precision(torch.device("cpu")):
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32 == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = original


# What else the indices mean.


def test_the_same_generator_draws_the_same_and_the_global_one_serves_by_default() -> None:
    quantizer, latents = make_quantizer(), random_latents()
    first = quantizer(latents, "mixture", 0.5, seeded(3))
    torch.manual_seed(3)
    second = quantizer(latents, "mixture", 0.5)
    third = quantizer(latents, "mixture", 0.5)
    assert torch.equal(first.quantized, second.quantized)
    assert not torch.equal(second.quantized, third.quantized)


# The start from the data.


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_the_start_takes_five_times_the_variance_of_each_layers_inputs(
    shares_codebook: bool,
) -> None:
    quantizer = make_quantizer((6, 6), shares_codebook=shares_codebook)
    latents = 3 * random_latents(batch=8, side=4) + 10
    quantizer.initialize(latents, seeded())
    rows = latents.movedim(1, -1).flatten(0, 2)
    for layer in range(2):
        variance = (rows - rows.mean(0)).square().mean().item()
        assert quantizer.variances()[layer].item() == pytest.approx(5 * variance, rel=1e-6)
        codes = quantizer.codebook(layer)
        rows = rows - codes[torch.cdist(rows, codes).argmin(1)]


def test_the_initial_codes_are_inputs_plus_noise_of_a_fifth_of_their_variance() -> None:
    torch.manual_seed(0)
    latents = torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1).expand(2, 2, 40, 40)
    for factor, deviation in ((0.0, 0.0), (0.2, math.sqrt(0.2 * 100))):
        config = StochasticQuantizerConfig(noise_factor=factor)
        quantizer = StochasticQuantizer(group_of((3000,), 2), config)
        quantizer.initialize(latents, seeded())
        codes = quantizer.codebook(0).detach()
        if not factor:
            assert set(codes.unique().tolist()) == {-10.0, 10.0}
            assert torch.equal(codes[:, 0], codes[:, 1])
        spread = (codes.var().item() - 100) if factor else 0.0
        assert spread == pytest.approx(deviation**2, rel=0.15)


def test_the_start_leaves_the_posterior_wide() -> None:
    quantizer = StochasticQuantizer(group_of((512,), 64), StochasticQuantizerConfig())
    latents = torch.randn(16, 64, 8, 8)
    quantizer.initialize(latents, seeded())
    others = torch.randn(16, 64, 8, 8)  # not those that became codes
    entropy = quantizer(others, "sample", 1.0, seeded()).posterior_entropy.mean() / 64
    assert entropy > math.log(512) / 2


@pytest.mark.parametrize("latents", [torch.ones(4, 3, 2, 2), torch.randn(1, 3, 1, 1)])
def test_a_start_from_inputs_that_do_not_vary_is_rejected(latents: Tensor) -> None:
    with pytest.raises(InputError, match="images"):
        make_quantizer().initialize(latents, seeded())
