"""The terms of the bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from tokenizer.objective import check_bound, discretized_code_length, gaussian_reconstruction
from tokenizer.storage.errors import InputError

BYTES = torch.arange(256).double() / 127.5 - 1


@settings(max_examples=25)
@given(
    squared_error=st.floats(1e-3, 1e6), num_values=st.integers(1, 10_000), factor=st.floats(0.1, 10)
)
def test_the_reconstruction_term_is_the_best_gaussian_up_to_a_constant(
    squared_error: float, num_values: int, factor: float
) -> None:
    value = torch.tensor(squared_error, dtype=torch.float64, requires_grad=True)
    term = gaussian_reconstruction(value, num_values)
    term.backward()
    assert value.grad is not None
    half, best = num_values / 2, squared_error / num_values
    assert term.item() == pytest.approx(half * math.log(best), rel=1e-12, abs=1e-9)
    assert value.grad.item() == pytest.approx(half / squared_error)  # grows as the error falls

    def gaussian(variance: float) -> float:
        return squared_error / (2 * variance) + half * math.log(variance)

    # min over σ² of SSE / (2 σ²) + D/2 log σ² is reached at SSE / D and equals the term + D/2.
    assert gaussian(best) == pytest.approx(term.item() + half)
    assert gaussian(factor * best) >= gaussian(best) - 1e-9 * abs(gaussian(best))


def code_lengths(levels: Tensor, mean: float, variance: float) -> Tensor:
    images = levels.view(-1, 1, 1, 1)
    return discretized_code_length(images, torch.full_like(images, mean), variance)


@settings(max_examples=50)
@given(mean=st.floats(-1.2, 1.2), variance=st.floats(1e-9, 4))
def test_code_lengths_are_those_of_a_distribution_over_bytes(mean: float, variance: float) -> None:
    nats = code_lengths(BYTES, mean, variance)
    assert nats.isfinite().all()
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("deviation", [0.002, 0.02, 0.5])
def test_a_code_length_is_minus_the_logarithm_of_a_difference_of_normal_integrals(
    deviation: float,
) -> None:
    normal = Normal(torch.tensor(0.1, dtype=torch.float64), deviation)
    near = (BYTES[1:-1] - 0.1).abs() < 5 * deviation
    inner = BYTES[1:-1][near]
    mass = normal.cdf(inner + 1 / 255) - normal.cdf(inner - 1 / 255)
    torch.testing.assert_close(code_lengths(inner, 0.1, deviation**2), -mass.log())


def test_exact_reconstructions_have_a_finite_loss_and_gradient() -> None:
    error = torch.zeros((), requires_grad=True)
    term = gaussian_reconstruction(error, 12)
    term.backward()
    assert term.isfinite()
    assert error.grad is not None
    assert error.grad.isfinite()


@pytest.mark.parametrize(
    ("variance", "codes", "message"),
    [
        ("x", "nearest", "^decoder_variance must be a finite number > 0, got 'x'$"),
        (None, "soft", "^codes must be one of posterior, nearest, got 'soft'$"),
    ],
)
def test_a_bound_of_another_type_is_refused_in_one_line(
    variance: object, codes: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_bound(variance, codes, has_posterior=True)
