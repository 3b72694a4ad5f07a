"""What every quantizer keeps to, whatever its kind."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.tiny import group_of, random_latents, seeded, summed_codes
from tokenizer import InputError, Quantizer
from tokenizer.config import (
    FiniteScalarQuantizerConfig,
    NearestQuantizerConfig,
    StochasticQuantizerConfig,
)
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.base import Mode, random_rows

CONFIGS = {
    "stochastic": StochasticQuantizerConfig(),
    "nearest": NearestQuantizerConfig(),
    "fsq": FiniteScalarQuantizerConfig(levels=(4, 3)),
}
MODES: tuple[Mode, ...] = ("mixture", "sample", "nearest")
EVERY_KIND = pytest.mark.parametrize("kind", CONFIGS)
WITH_TABLE = pytest.mark.parametrize("kind", ["stochastic", "nearest"])


def make_quantizer(
    kind: str, depth: int = 2, dim: int = 3, seed: int = 0, shares_codebook: bool = False
) -> Quantizer:
    """A quantizer in float64 with 12 codes per layer."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]
    group = group_of((12,) * depth, dim, shares_codebook)
    quantizer: Quantizer = QUANTIZERS[type(config)](group, config).double()
    return quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["sample", "nearest"])
@pytest.mark.parametrize("shares_codebook", [False, True])
@EVERY_KIND
def test_hard_codes_are_the_summed_code_vectors_of_the_indices_to_the_last_bit(
    kind: str, shares_codebook: bool, mode: Mode, dtype: torch.dtype
) -> None:
    # A grid is never shared.
    quantizer = make_quantizer(kind, 3, shares_codebook=shares_codebook and kind != "fsq").to(dtype)
    output = quantizer(100 * random_latents().to(dtype), mode, 1.0, seeded())
    assert output.indices.shape == (2, 3, 2, 3)
    assert output.posterior_entropy.shape == (2, 3)
    assert torch.equal(output.quantized, summed_codes(quantizer, output.indices))


@EVERY_KIND
@settings(max_examples=25)
@given(
    temperature=st.floats(1e-3, 50),
    log_s2=st.lists(st.floats(-8, 8), min_size=2, max_size=2),
    seed=st.integers(0, 10_000),
)
def test_nearest_codes_depend_on_neither_temperature_nor_variance_nor_noise_nor_the_batch(
    kind: str, temperature: float, log_s2: list[float], seed: int
) -> None:
    quantizer, latents = make_quantizer(kind, seed=seed), random_latents(seed=seed)
    expected = quantizer(latents, "nearest")
    with torch.no_grad():
        for name, role in quantizer.learned_roles().items():
            if role == "variance":
                quantizer.get_parameter(name).copy_(torch.tensor(log_s2))
    found = quantizer(latents[1:], "nearest", temperature, seeded(seed))
    assert torch.equal(found.indices, expected.indices[1:])
    assert torch.equal(found.quantized, expected.quantized[1:])


@EVERY_KIND
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_output_and_all_stay_in_float32(
    kind: str, mode: Mode, dtype: torch.dtype
) -> None:
    quantizer = make_quantizer(kind, dim=32).float()
    latents = random_latents(32, batch=4, side=6).to(dtype)
    expected = quantizer(latents, mode, 0.5, seeded())
    codebook = quantizer.codebook(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latents, mode, 0.5, seeded())
        assert torch.equal(quantizer.codebook(1), codebook)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for found in (*output[:-1], *output.latent_terms.values()):
        assert found.dtype in (torch.int64, torch.float32)


@pytest.mark.parametrize("kind", ["nearest", "fsq"])
def test_without_a_posterior_a_mixture_has_the_value_of_the_nearest_codes_and_no_variance(
    kind: str,
) -> None:
    quantizer, latents = make_quantizer(kind), random_latents()
    hard, mixture = quantizer(latents, "nearest"), quantizer(latents, "mixture")
    assert torch.equal(mixture.indices, hard.indices)
    torch.testing.assert_close(mixture.quantized, hard.quantized, rtol=1e-12, atol=1e-12)
    assert (mixture.posterior_entropy == 0).all()
    assert not quantizer.has_posterior
    assert len(quantizer.variances()) == len(quantizer.learned_roles()) == 0
    with pytest.raises(InputError, match=r"^\w+ has no posterior over its codes$"):
        quantizer.log_posteriors(latents, hard.indices)


@WITH_TABLE
@settings(max_examples=25)
@given(
    permutation=st.permutations(range(12)),
    layer=st.integers(0, 1),
    log_scale=st.floats(-2, 2),
    seed=st.integers(0, 10_000),
)
def test_permuting_a_codebook_permutes_its_indices_and_scaling_all_leaves_them(
    kind: str, permutation: list[int], layer: int, log_scale: float, seed: int
) -> None:
    quantizer, latents = make_quantizer(kind, seed=seed), random_latents(seed=seed)
    expected = quantizer(latents, "nearest")
    order, scale = torch.tensor(permutation), 10**log_scale
    with torch.no_grad():
        quantizer.codebook(layer).copy_(quantizer.codebook(layer)[order].clone())
        output = quantizer(latents, "nearest")
        for number in range(2):
            quantizer.codebook(number).mul_(scale)
    restored = output.indices.clone()
    restored[:, layer] = order[output.indices[:, layer]]
    assert torch.equal(restored, expected.indices)
    assert torch.equal(output.quantized, expected.quantized)
    assert torch.equal(quantizer(scale * latents, "nearest").indices, output.indices)


@WITH_TABLE
def test_the_start_from_data_is_that_of_the_generator_whatever_was_there(kind: str) -> None:
    latents = random_latents(batch=8, side=4)
    quantizers = [make_quantizer(kind, seed=seed) for seed in (0, 5, 0)]
    for quantizer, seed in zip(quantizers, (1, 1, 2), strict=True):
        quantizer.initialize(latents, seeded(seed))
    for name, tensor in quantizers[0].state_dict().items():
        assert torch.equal(tensor, quantizers[1].state_dict()[name])
    assert not torch.equal(quantizers[0].codebook(0), quantizers[2].codebook(0))


@EVERY_KIND
def test_a_step_can_be_copied_and_moves_only_what_no_gradient_teaches(kind: str) -> None:
    quantizer = make_quantizer(kind)
    quantizer(random_latents(), "mixture", 1.0, seeded())
    copied = copy.deepcopy(quantizer)  # with the statistics of the step
    quantizer.after_step(lambda tensor: tensor, lambda tensor: tensor)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, copied.state_dict()[name]) == (kind != "nearest"), name


@settings(max_examples=25)
@given(rows=st.integers(1, 8), count=st.integers(1, 12))
def test_random_rows_repeat_only_if_there_are_too_few(rows: int, count: int) -> None:
    table = torch.arange(rows).float().unsqueeze(1)
    for generator in (seeded(), None):
        chosen = random_rows(table, count, generator).flatten().tolist()
        assert len(chosen) == count
        assert set(chosen) <= set(range(rows))
        if rows >= count:
            assert len(set(chosen)) == count
