"""The terms of the bound and the temperature schedule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from tokenizer.objective import gaussian_code_length, gaussian_reconstruction, temperature_at
from tokenizer.quantizers import StochasticQuantizerConfig


@settings(max_examples=25)
@given(squared_error=st.floats(1e-6, 1e6), num_values=st.integers(1, 10_000))
def test_the_reconstruction_term_is_half_d_log_of_the_mean_squared_error(
    squared_error: float, num_values: int
) -> None:
    found = gaussian_reconstruction(torch.tensor(squared_error, dtype=torch.float64), num_values)
    expected = num_values / 2 * math.log(squared_error / num_values)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-9)


@settings(max_examples=25)
@given(mean_squared_error=st.floats(1e-4, 10), factor=st.floats(0.1, 10))
def test_the_reconstruction_term_is_the_best_gaussian_up_to_a_constant(
    mean_squared_error: float, factor: float
) -> None:
    # min over σ² of SSE / (2 σ²) + D/2 log σ² is reached at SSE / D and equals the term + D/2.
    num_values = 12
    squared_error = mean_squared_error * num_values
    term = gaussian_reconstruction(
        torch.tensor(squared_error, dtype=torch.float64), num_values
    ).item()
    variance = factor * mean_squared_error
    other = squared_error / (2 * variance) + num_values / 2 * math.log(variance)
    assert other >= term + num_values / 2 - 1e-9
    if factor == 1:
        assert other == pytest.approx(term + num_values / 2)


def test_the_gradient_of_the_reconstruction_term_grows_as_the_error_falls() -> None:
    squared_errors = [10.0, 1.0, 0.1]
    gradients = []
    for value in squared_errors:
        squared_error = torch.tensor(value, requires_grad=True)
        gaussian_reconstruction(squared_error, 12).backward()
        assert squared_error.grad is not None
        gradients.append(squared_error.grad.item())
    assert gradients == pytest.approx([6 / value for value in squared_errors])


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


@settings(max_examples=50)
@given(
    initial=st.floats(0.01, 10),
    final=st.floats(0.01, 10),
    hold=st.floats(0, 0.99),
    total_steps=st.integers(2, 10_000),
    data=st.data(),
)
def test_the_temperature_is_held_then_goes_exponentially_from_initial_to_final(
    initial: float, final: float, hold: float, total_steps: int, data: st.DataObject
) -> None:
    config = StochasticQuantizerConfig(
        initial_temperature=initial, final_temperature=final, temperature_hold=hold
    )
    assert temperature_at(config, 0, total_steps) == pytest.approx(initial)
    assert temperature_at(config, total_steps - 1, total_steps) == pytest.approx(final)
    assert temperature_at(config, 2 * total_steps, total_steps) == pytest.approx(final)
    step = data.draw(st.integers(0, total_steps - 1))
    share = max(step / (total_steps - 1) - hold, 0.0) / (1 - hold)
    expected = math.exp((1 - share) * math.log(initial) + share * math.log(final))
    assert temperature_at(config, step, total_steps) == pytest.approx(expected)


def test_a_run_of_one_step_has_the_initial_temperature() -> None:
    config = StochasticQuantizerConfig(initial_temperature=0.8)
    assert temperature_at(config, 0, 1) == 0.8
