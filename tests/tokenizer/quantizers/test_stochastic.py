"""Stochastic quantization against slow literal references, and its laws."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from tests.tokenizer.tiny import group_of, random_latents, seeded
from tokenizer.config import StochasticQuantizerConfig
from tokenizer.quantizers import QuantizerOutput, StochasticQuantizer
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


def literal_group(
    quantizer: StochasticQuantizer, latents: Tensor, mode: Mode, temperature: float, seed: int
) -> tuple[QuantizerOutput, list[Tensor]]:
    """A group by its formulas, all layers over whole matrices in float64; and its posteriors."""
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
    quantized, errors = latents - rest.movedim(-1, 1), (rest**2).sum((1, 2, 3))
    terms = {"quantization_error": errors / (2 * variances.sum())}
    output = QuantizerOutput(quantized, torch.stack(indices, 1), torch.stack(entropies, 1), terms)
    return output, posteriors


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
    expected, posteriors = literal_group(quantizer, latents, mode, 0.7, 7)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    if mode != "mixture":  # the posteriors follow hard codes of the layers before
        log_posteriors = quantizer.log_posteriors(latents, output.indices)
        torch.testing.assert_close([own.exp() for own in log_posteriors], posteriors)


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
    latents = torch.tensor([0.3, -0.5]).double().view(1, 2, 1, 1).expand(20_000, 2, 1, 1)
    for mode in ("sample", "mixture"):
        indices = quantizer(latents, mode, 0.5, seeded()).indices
        counts = torch.bincount(indices.flatten(), minlength=5).double()
        expected = 20_000 * quantizer.log_posteriors(latents[:1], indices[:1])[0].exp().flatten()
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
        expected = plain._replace(quantized=scale * plain.quantized)
        torch.testing.assert_close(output, expected)
    posteriors = quantizer.log_posteriors(latents, plain.indices)
    found = scaled.log_posteriors(scale * latents, plain.indices)
    torch.testing.assert_close(found, posteriors)


@settings(max_examples=25)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    log_s2=st.floats(-6, 6),
)
def test_the_latent_terms_fall_as_a_variance_grows_and_entropies_lie_between_zero_and_log_k(
    seed: int, sizes: tuple[int, ...], log_s2: float
) -> None:
    # Facts 4, for hard samples, and 7: each s² of a group, by its exact gradient. Of the
    # expectation over k it follows from fact 1.
    quantizer = make_quantizer(sizes, seed=seed)
    with torch.no_grad():
        quantizer.log_variances.add_(log_s2)
    output = quantizer(random_latents(seed=seed), "sample", 1.0, seeded(seed))
    latent_terms(output).sum().backward()
    assert quantizer.log_variances.grad is not None
    assert (quantizer.log_variances.grad < 0).all()
    limits = 6 * torch.tensor(sizes).double().log()  # of 6 positions
    assert (output.posterior_entropy >= -1e-12).all()
    assert (output.posterior_entropy <= limits + 1e-9).all()


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_every_code_and_variance_of_every_layer_gets_a_gradient(shares_codebook: bool) -> None:
    # Fact 6: of the last residual layer too, from each of the two terms and from the output.
    quantizer = make_quantizer((4, 4, 4), shares_codebook=shares_codebook)
    latents = random_latents().requires_grad_()
    output = quantizer(latents, "mixture", 0.7, seeded())
    inputs = [*quantizer.parameters(), latents]
    (error,) = output.latent_terms.values()
    for term in (error, output.posterior_entropy, output.quantized.square()):
        for gradient in torch.autograd.grad(term.sum(), inputs, retain_graph=True):
            assert (gradient != 0).any()
    # Residuals are not detached: later layers reach the codes of those before.
    for later, earlier in ((1, 0), (2, 0), (2, 1)):
        entropy, codebook = output.posterior_entropy[:, later].sum(), quantizer.codebook(earlier)
        (gradient,) = torch.autograd.grad(entropy, codebook, retain_graph=True)
        assert (gradient != 0).any()
    *gradients, _ = torch.autograd.grad(latent_terms(output).sum(), inputs)
    assert all((own.view(len(own), -1).abs().sum(1) > 0).all() for own in gradients)


# The pitfalls of the method.


@pytest.mark.parametrize("log_s2", [-1e3, -60, -50, -40, -39, 39, 40, 50, 89, 1e3])
@pytest.mark.parametrize("mode", ["mixture", "sample"])
def test_values_and_gradients_are_finite_whatever_the_variance(mode: Mode, log_s2: float) -> None:
    quantizer = make_quantizer().float()
    with torch.no_grad():
        quantizer.log_variances.fill_(log_s2)
    latents = random_latents().float().requires_grad_()
    output = quantizer(latents, mode, 0.7, seeded())
    inputs = [*quantizer.parameters(), latents]
    value = latent_terms(output).sum() + output.quantized.square().sum()
    for number in (value, *torch.autograd.grad(value, inputs)):
        assert number.isfinite().all()
    assert all(own.isfinite().all() for own in quantizer.log_posteriors(latents, output.indices))


def test_distances_far_from_the_origin_are_as_exact_as_near_it() -> None:
    quantizer = make_quantizer((64,), 8).float()
    with torch.no_grad():
        quantizer.codebook(0).add_(300)
    latents = 300 + random_latents(8, batch=50, side=4).float()
    indices = quantizer(latents, "nearest").indices
    (found,) = quantizer.log_posteriors(latents, indices)
    mixed = quantizer(latents, "mixture", 0.7, seeded())
    exact = quantizer.double()
    latents = latents.double()
    assert torch.equal(indices, exact(latents, "nearest").indices)
    torch.testing.assert_close(
        found.double(), exact.log_posteriors(latents, indices)[0], atol=1e-3, rtol=0
    )
    entropy = exact(latents, "mixture", 0.7, seeded()).posterior_entropy
    torch.testing.assert_close(mixed.posterior_entropy.double(), entropy, atol=1e-2, rtol=0)


def test_tf32_is_off_inside_and_as_before_outside() -> None:
    for before in (True, False):  # the last is the default of all other tests
        torch.backends.cuda.matmul.allow_tf32 = before
        with contextlib.suppress(KeyError), full_precision(torch.device("cpu")):
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32 == before


# The start from the data.


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_the_start_takes_five_times_the_variance_of_each_layers_inputs(
    shares_codebook: bool,
) -> None:
    quantizer = make_quantizer((6, 6), shares_codebook=shares_codebook)
    latents = 3 * random_latents(batch=8, side=4) + 10
    quantizer.initialize(latents, seeded())
    rows, variances = latents.movedim(1, -1).flatten(0, 2), []
    for layer in range(2):
        variances.append((rows - rows.mean(0)).square().mean())
        codes = quantizer.codebook(layer)
        rows = rows - codes[torch.cdist(rows, codes).argmin(1)]
    torch.testing.assert_close(quantizer.variances(), 5 * torch.stack(variances))


@pytest.mark.parametrize(("factor", "variance"), [(0.0, 0.0), (0.2, 0.2 * 100)])
def test_the_initial_codes_are_inputs_plus_noise_of_a_fifth_of_their_variance(
    factor: float, variance: float
) -> None:
    latents = torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1).expand(2, 2, 40, 40)
    config = StochasticQuantizerConfig(noise_factor=factor)
    quantizer = StochasticQuantizer(group_of((3000,), 2), config)
    quantizer.initialize(latents, seeded())
    codes = quantizer.codebook(0).detach()
    assert codes.var().item() - 100 == pytest.approx(variance, rel=0.15, abs=0.1)
    if not factor:
        assert set(codes.unique(dim=0).flatten().tolist()) == {-10.0, 10.0}
        assert torch.equal(codes[:, 0], codes[:, 1])


@pytest.mark.parametrize("latents", [torch.ones(4, 3, 2, 2), torch.randn(1, 3, 1, 1)])
def test_a_start_from_inputs_that_do_not_vary_is_rejected(latents: Tensor) -> None:
    with pytest.raises(InputError, match="images"):
        make_quantizer().initialize(latents, seeded())
