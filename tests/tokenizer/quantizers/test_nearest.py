"""The deterministic baselines against slow literal references, and their laws."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.tokenizer.tiny import group_of, random_latents, seeded
from tokenizer.config import NearestQuantizerConfig
from tokenizer.quantizers import NearestQuantizer
from tokenizer.quantizers.base import Collective


def make_quantizer(
    sizes: tuple[int, ...] = (5, 4),
    seed: int = 0,
    shares_codebook: bool = False,
    **config: float,
) -> NearestQuantizer:
    torch.manual_seed(seed)
    group = group_of(sizes, shares_codebook=shares_codebook)
    return NearestQuantizer(group, NearestQuantizerConfig.model_validate(config)).double()


def itself(tensor: Tensor) -> Tensor:
    return tensor


def rows_of(images: Tensor) -> Tensor:
    return images.movedim(1, -1).flatten(0, 2)  # (N, D)


def literal_layers(
    quantizer: NearestQuantizer, latents: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer: residual before it, indices, and partial sum of the code vectors."""
    rows = rows_of(latents)
    total = torch.zeros_like(rows)
    for layer in range(quantizer.num_layers):
        residual, codebook = rows - total, quantizer.codebook(layer)
        chosen = ((residual.unsqueeze(1) - codebook) ** 2).sum(2).argmin(1)
        total = total + codebook[chosen]
        yield residual, chosen, total


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_indices_codes_commitment_and_straight_through_gradient_equal_the_literal_formulas(
    shares_codebook: bool,
) -> None:
    sizes = (5, 5, 5) if shares_codebook else (5, 4, 3)
    quantizer = make_quantizer(sizes, shares_codebook=shares_codebook)
    latents = random_latents().requires_grad_()
    output = quantizer(latents, "mixture")
    commitment, pull = torch.zeros(2).double(), torch.zeros(12, 3).double()
    for layer, (_, chosen, total) in enumerate(literal_layers(quantizer, latents.detach())):
        assert torch.equal(output.indices[:, layer].flatten(), chosen)
        # The mean over layers, positions and dimensions: every partial sum counts.
        difference = rows_of(latents.detach()) - total
        commitment += (difference**2).view(2, -1).mean(1) / 3
        pull += 2 * difference / (3 * 6 * 3)
    torch.testing.assert_close(rows_of(output.quantized), total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(output.latent_terms), {"commitment": commitment})
    (gradient,) = torch.autograd.grad(output.latent_terms["commitment"].sum(), latents)
    torch.testing.assert_close(rows_of(gradient), pull)
    weights = torch.randn_like(latents)
    (gradient,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("shares_codebook", [False, True])
def test_codebooks_move_as_the_literal_moving_means(shares_codebook: bool) -> None:
    sizes = (5, 5) if shares_codebook else (5, 4)
    quantizer = make_quantizer(
        sizes, shares_codebook=shares_codebook, decay=0.9, restart_threshold=0.0
    )
    codebooks = [quantizer.codebook(number).clone() for number in range(quantizer.num_codebooks)]
    mean_counts, mean_sums = [torch.ones(len(own)).double() for own in codebooks], codebooks
    for step in range(3):
        counts = [torch.zeros(len(own)) for own in codebooks]
        sums = [torch.zeros_like(own) for own in codebooks]
        for micro_batch in range(2):  # gradient accumulation: two forwards, one update
            latents = random_latents(3, 10 * step + micro_batch)
            for layer, (residual, chosen, _) in enumerate(literal_layers(quantizer, latents)):
                for row, k in zip(residual, chosen.tolist(), strict=True):
                    counts[layer % len(codebooks)][k] += 1
                    sums[layer % len(codebooks)][k] += row
            quantizer(latents, "mixture")
        quantizer.after_step(itself, itself)
        mean_counts = [0.9 * a + 0.1 * b for a, b in zip(mean_counts, counts, strict=True)]
        mean_sums = [0.9 * a + 0.1 * b for a, b in zip(mean_sums, sums, strict=True)]
        for number, (count, total) in enumerate(zip(mean_counts, mean_sums, strict=True)):
            smoothed = (count + 1e-5) / (count.sum() + len(count) * 1e-5) * count.sum()
            expected = total / smoothed.unsqueeze(1)
            torch.testing.assert_close(quantizer.codebook(number), expected)


def test_evaluation_and_encoding_leave_no_trace_in_the_next_update() -> None:
    quantizer, reference = make_quantizer(), make_quantizer()
    quantizer.eval()(random_latents(3, 5), "mixture")
    quantizer.train()(random_latents(3, 6), "nearest")  # encoded in the middle of training
    for entry in (quantizer, reference):
        torch.manual_seed(0)
        entry(random_latents(3, 7), "mixture")
        entry.after_step(itself, itself)
    torch.testing.assert_close(quantizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_a_dead_code_restarts_as_an_input_and_a_living_one_does_not() -> None:
    quantizer = make_quantizer((4,))
    latents = random_latents()
    rows = rows_of(latents)
    with torch.no_grad():
        quantizer.codebook(0)[0] = 100.0  # never the nearest
        quantizer.codebook(0)[1:] = rows[:3]
        quantizer.get_buffer("mean_sum_0").copy_(quantizer.codebook(0))
    counts = torch.bincount(quantizer(latents, "mixture").indices.flatten(), minlength=4)
    quantizer.after_step(itself, itself)
    assert counts[0] == 0
    assert (counts[1:] >= 1).all()
    distances = torch.cdist(quantizer.codebook(0), rows).amin(1)
    assert distances[0] < 1e-3
    assert (distances[1:] < 0.1).all()  # moved by 1 %
    mean_count = quantizer.get_buffer("mean_count_0")
    expected = torch.where(counts < 1, 1.0, 0.99 + 0.01 * counts).double()
    torch.testing.assert_close(mean_count, expected)


@pytest.mark.parametrize("restart_threshold", [0.0, 1.0])
def test_two_processes_with_summed_statistics_equal_one_with_the_joint_batch(
    restart_threshold: float,
) -> None:
    sizes, halves = (6, 6), (random_latents(3, 1), random_latents(3, 2, batch=3))
    candidates = rows_of(random_latents(3, 9))[:6]

    def run(latents: Tensor, total: Collective) -> NearestQuantizer:
        quantizer = make_quantizer(sizes, restart_threshold=restart_threshold)
        with torch.no_grad():
            quantizer.codebook(0)[0] = 100.0  # dead everywhere
        quantizer(latents, "mixture")
        quantizer.after_step(total, lambda tensor: candidates)
        return quantizer

    shares: tuple[list[Tensor], list[Tensor]] = ([], [])  # what each process would hand over
    for own, share in zip(halves, shares, strict=True):
        run(own, lambda tensor, share=share: share.append(tensor.clone()) or tensor)
    joint = run(torch.cat(halves), itself).state_dict()
    for own in halves:
        sums = iter([one + other for one, other in zip(*shares, strict=True)])
        process = run(own, lambda _, sums=sums: next(sums))
        torch.testing.assert_close(process.state_dict(), joint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("starts_from_data", [True, False])
def test_the_start_draws_codes_from_each_layers_inputs_or_leaves_them_as_drawn(
    starts_from_data: bool, dtype: torch.dtype
) -> None:
    quantizer = make_quantizer(starts_from_data=starts_from_data).to(dtype)
    before, latents = quantizer.codebook(0).clone(), random_latents().to(dtype)
    quantizer.initialize(latents, seeded(0))
    assert torch.equal(quantizer.codebook(0), before) != starts_from_data
    rows = rows_of(latents)
    for layer in range(2 if starts_from_data else 0):
        codes = quantizer.codebook(layer)
        distances = torch.cdist(codes, rows)
        torch.testing.assert_close(distances.amin(1), torch.zeros(len(codes), dtype=dtype))
        assert len(codes.unique(dim=0)) > 1
        rows = rows - codes[torch.cdist(rows, codes).argmin(1)]
        assert torch.equal(quantizer.get_buffer(f"mean_sum_{layer}"), codes)
