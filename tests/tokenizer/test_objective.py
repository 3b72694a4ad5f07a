"""The terms of the bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from tokenizer.objective import gaussian_code_length, gaussian_reconstruction


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


def test_the_code_length_is_minus_the_log_density_times_the_bin() -> None:
    images = torch.randn(3, 2, 4, 5).double()
    means = torch.randn(3, 2, 4, 5).double()
    density = Normal(means, math.sqrt(0.3)).log_prob(images).flatten(1).sum(1)
    squared_errors = (images - means).square().flatten(1).sum(1)
    found = gaussian_code_length(squared_errors, 40, 0.3)
    torch.testing.assert_close(found, -density - 40 * math.log(2 / 255))


def test_code_lengths_of_a_wide_gaussian_make_up_a_distribution_over_bytes() -> None:
    levels = torch.arange(-255 * 4, 255 * 4 + 1).double() * (2 / 255)  # beyond the byte range too
    total = (-gaussian_code_length(levels.square(), 1, 0.25)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-9)
