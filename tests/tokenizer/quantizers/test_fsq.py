"""Finite scalar quantization against the formulas of arXiv 2309.15505, in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.tiny import NETWORKS, group_of, random_latents
from tokenizer import InputError, Tokenizer, fsq_vae
from tokenizer.config import FiniteScalarQuantizerConfig
from tokenizer.quantizers import FiniteScalarQuantizer

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


def make_quantizer(
    levels: tuple[int, ...], depth: int = 1, dim: int = 5, seed: int = 0
) -> FiniteScalarQuantizer:
    torch.manual_seed(seed)
    group = group_of((math.prod(levels),) * depth, dim)
    return FiniteScalarQuantizer(group, FiniteScalarQuantizerConfig(levels=levels)).double()


def plain_quantizer(levels: tuple[int, ...]) -> FiniteScalarQuantizer:
    """One whose projections change nothing: its latents are the values to bound."""
    quantizer = make_quantizer(levels, dim=len(levels))
    with torch.no_grad():
        for projection in (*quantizer.project_in, *quantizer.project_out):
            projection.weight.copy_(torch.eye(len(levels)))
            projection.bias.zero_()
    return quantizer


def literal_bound(value: float, levels: int) -> float:
    """Section A.1: tanh onto `levels` values, shifted by half a step where they are even."""
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    return math.tanh(value + math.atanh(offset / half)) * half - offset


def literal_code(values: list[float], levels: tuple[int, ...]) -> tuple[int, list[float]]:
    """Index in mixed radix, first dimension fastest, and the point on the grid in [-1, 1]."""
    index, basis, point = 0, 1, []
    for value, count in zip(values, levels, strict=True):
        rounded = round(literal_bound(value, count))
        point.append(rounded / (count // 2))
        index += (rounded + count // 2) * basis
        basis *= count
    return index, point


@settings(max_examples=40)
@given(levels=LEVELS, depth=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_indices_and_codes_of_every_layer_equal_the_literal_formulas(
    levels: tuple[int, ...], depth: int, seed: int
) -> None:
    quantizer = make_quantizer(levels, depth, seed=seed)
    latents = 3 * random_latents(5, seed)
    output = quantizer(latents, "nearest")
    for b, h, w in itertools.product(range(2), range(2), range(3)):
        rest, total = latents[b, :, h, w], torch.zeros(5).double()
        for layer in range(depth):
            values = quantizer.project_in[layer](rest).tolist()
            index, point = literal_code(values, levels)
            assert output.indices[b, layer, h, w] == index
            vector = quantizer.project_out[layer](torch.tensor(point).double())
            total, rest = total + vector, rest - vector
        torch.testing.assert_close(output.quantized[b, :, h, w], total)
    assert output.latent_terms == {}


@settings(max_examples=30)
@given(levels=LEVELS)
def test_each_code_is_a_row_of_its_own_that_is_quantized_to_itself(
    levels: tuple[int, ...],
) -> None:
    quantizer = plain_quantizer(levels)
    codebook = quantizer.codebook(0)
    size = math.prod(levels)
    assert codebook.shape == (size, len(levels))
    assert len(codebook.unique(dim=0)) == size
    assert codebook.abs().max() == 1
    # A value that is bounded to each point of the grid.
    half = (torch.tensor(levels).double() - 1) / 2 * 1.001
    offset = (torch.tensor(levels) % 2 == 0).double() / 2
    points = codebook * (torch.tensor(levels) // 2)
    values = ((points + offset) / half).atanh() - (offset / half).atanh()
    output = quantizer(values.T.reshape(1, len(levels), size, 1), "nearest")
    assert torch.equal(output.indices.flatten(), torch.arange(size))
    assert torch.equal(output.quantized.flatten(2)[0].T, codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_any_size_stay_on_the_grid(dtype: torch.dtype) -> None:
    for levels in ((2,), (3, 2), (512, 511)):
        quantizer = plain_quantizer(levels).to(dtype)
        sizes = torch.tensor([-1e30, 0.0, 1e30, math.nan], dtype=dtype)
        latents = sizes.view(1, 1, -1, 1).expand(1, len(levels), -1, -1)
        indices = quantizer(latents, "nearest").indices.flatten()
        assert indices[[0, 2]].tolist() == [0, math.prod(levels) - 1]
        assert (quantizer.codebook(0)[indices[[1, 3]]] == 0).all()  # zero stays zero


@settings(max_examples=25)
@given(levels=LEVELS, seed=st.integers(0, 10_000))
def test_the_gradient_is_that_of_the_bounded_values_by_finite_differences(
    levels: tuple[int, ...], seed: int
) -> None:
    quantizer = plain_quantizer(levels)
    latents = random_latents(len(levels), seed).requires_grad_()
    (found,) = torch.autograd.grad(quantizer(latents, "mixture").quantized.sum(), latents)
    for d, levels_of_dim in enumerate(levels):
        for value, slope in zip(latents[:, d].flatten(), found[:, d].flatten(), strict=True):
            high, low = (literal_bound(value.item() + e, levels_of_dim) for e in (1e-6, -1e-6))
            expected = (high - low) / 2e-6 / (levels_of_dim // 2)
            assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_every_parameter_of_every_layer_gets_a_gradient() -> None:
    quantizer = make_quantizer((4, 3), depth=3)
    quantizer(random_latents(5), "mixture").quantized.square().sum().backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    ("sizes", "shares_codebook"), [((12, 11), False), ((16,), False), ((12, 12), True)]
)
def test_another_codebook_size_or_a_shared_codebook_is_refused_in_one_line(
    sizes: tuple[int, ...], shares_codebook: bool
) -> None:
    group = group_of(sizes, shares_codebook=shares_codebook)
    with pytest.raises(InputError, match=r"^codebook_sizes must all be 12, the product of levels"):
        FiniteScalarQuantizer(group, FiniteScalarQuantizerConfig(levels=(4, 3)))


def test_the_hash_tells_the_levels_and_weights_of_other_levels_are_refused() -> None:
    # The sizes of the weights are equal, and the codes would be others.
    one, other = (Tokenizer(fsq_vae(4, own, 4, networks=NETWORKS)) for own in ((4, 2), (2, 4)))
    names = one.state_dict().keys() - {name for name, _ in one.named_parameters()}
    assert names == {"top_down.groups.0.quantizer.levels"}
    with pytest.raises(InputError, match=r"levels must be \(2, 4\), as in .*, got \(4, 2\)"):
        other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), one.parameters(), strict=True):
            parameter.copy_(value)
    assert one.content_hash() != other.content_hash()
