"""Distances, errors of reconstructions, use of the codes."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.evaluation.features import FeatureOutput
from pipelines.evaluation.metrics import (
    MIN_IMAGES,
    CodeUsage,
    ImageErrors,
    check_num_images,
    frechet_distance,
    generation_metrics,
    image_errors,
    metric_name,
    perplexity,
    reconstruction_metrics,
)
from tokenizer.config import CodeMapConfig
from tokenizer.storage.errors import InputError


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def standardized(seed: int, num_images: int, dim: int) -> Tensor:
    """Samples whose empirical mean is exactly 0 and covariance exactly 1."""
    samples = normal(seed, num_images, dim)
    samples = samples - samples.mean(dim=0)
    factor = torch.linalg.cholesky(torch.cov(samples.T))
    whitened: Tensor = torch.linalg.solve_triangular(factor, samples.T, upper=False).T
    return whitened


def outputs(seed: int, num_images: int, dim: int = 4, shift: float = 0.0) -> FeatureOutput:
    features = (normal(seed, num_images, dim) + shift).float()
    return FeatureOutput(features, normal(seed + 1000, num_images, 10).float())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(2, 6), st.floats(0.0, 50.0))
def test_the_distance_of_gaussians_has_its_closed_form(seed: int, dim: int, shift: float) -> None:
    mixes = normal(seed, dim, dim), normal(seed + 1, dim, dim)
    means = normal(seed + 2, dim), normal(seed + 3, dim) + shift
    features_a, features_b = (
        standardized(seed + 4 + i, 50 - 20 * i, dim) @ mix.T + mean
        for i, (mix, mean) in enumerate(zip(mixes, means, strict=True))
    )
    # tr (AB)^(1/2) is the nuclear norm of A^(1/2) B^(1/2), for any square roots.
    root = torch.linalg.svdvals(mixes[0].T @ mixes[1]).sum()
    spread = sum(mix.square().sum() for mix in mixes) - 2 * root
    expected = (means[0] - means[1]).square().sum() + spread
    assert frechet_distance(features_a, features_b) == pytest.approx(
        expected.item(), rel=1e-6, abs=1e-6
    )


def test_float32_features_far_from_zero_keep_their_distance() -> None:
    features = (normal(0, 20_000, 2) + 1000).float()
    assert frechet_distance(features, features + 1) == pytest.approx(2, rel=1e-6)


def test_only_inception_gives_metrics_without_a_suffix() -> None:
    names = ["FD", "IS", "KID", "precision", "recall"]
    for extractor, expected in (
        ("Inception", ["FID", *names[1:]]),
        ("MobileNetV2", [f"{name}-MobileNetV2" for name in names]),
    ):
        metrics = generation_metrics(outputs(0, 30), outputs(1, 30), extractor, 0)
        assert sorted(metrics) == sorted(expected)
    assert metric_name("rFD", "Inception") == "rFID"
    assert metric_name("FD", "Inception-0a1b2c3d") == "FD-Inception-0a1b2c3d"


def test_the_inception_score_has_its_closed_form() -> None:
    # Certain predictions, 5 classes: every split of the shuffled set scores exp(entropy) <= 5.
    labels = torch.arange(500) % 5
    logits = torch.nn.functional.one_hot(labels, 7).float() * 200
    generated = FeatureOutput(normal(0, 500, 3).float(), logits)
    score = generation_metrics(generated, outputs(1, 30, dim=3), "Inception", 3)["IS"]
    order = np.random.RandomState(3).permutation(500)
    chunks = np.split(labels.numpy()[order], 10)
    expected = [
        math.exp(-sum(p * math.log(p) for p in np.bincount(chunk) / len(chunk) if p > 0))
        for chunk in chunks
    ]
    assert score == pytest.approx(float(np.mean(expected)), rel=1e-6)


def test_the_kernel_distance_equals_its_double_sum() -> None:
    generated, reference = outputs(0, 25), outputs(7, 25, shift=0.5)
    distance = generation_metrics(generated, reference, "Inception", 0)["KID"]
    x, y = generated.features.double().numpy(), reference.features.double().numpy()

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within = sum(
        kernel(s[i], s[j]) for s in (x, y) for i in range(25) for j in range(25) if i != j
    ) / (25 * 24)
    between = sum(kernel(a, b) for a in x for b in y) / 25**2
    assert distance == pytest.approx(within - 2 * between, rel=1e-6)


def literal_precision(generated: np.ndarray, reference: np.ndarray) -> float:
    inside = 0
    for sample in generated:
        inside += any(
            np.linalg.norm(sample - center)
            <= sorted(np.linalg.norm(reference - center, axis=1))[3]  # 0th: itself
            for center in reference
        )
    return inside / len(generated)


def test_precision_is_of_the_generated_and_recall_of_the_reference_images() -> None:
    # Generated: a narrow part of the reference. Precise, but with low recall.
    generated, reference = outputs(0, 40), outputs(1, 60)
    generated = generated._replace(features=generated.features * 0.2)
    metrics = generation_metrics(generated, reference, "Inception", 0)
    ours, theirs = generated.features.double().numpy(), reference.features.double().numpy()
    assert metrics["precision"] == pytest.approx(literal_precision(ours, theirs))
    assert metrics["recall"] == pytest.approx(literal_precision(theirs, ours))
    assert metrics["recall"] < 0.5 < metrics["precision"]


@pytest.mark.parametrize("num_images", [25, 100])
def test_metrics_of_identical_sets_are_perfect_even_with_fewer_images_than_features(
    num_images: int,
) -> None:
    same = outputs(0, num_images, dim=40)
    metrics = generation_metrics(same, same, "Inception", 0)
    assert metrics["FID"] == pytest.approx(0, abs=1e-4)
    assert metrics["precision"] == metrics["recall"] == 1


def test_metrics_are_a_function_of_the_seed() -> None:
    generated, reference = outputs(0, 60), outputs(1, 90)
    first = generation_metrics(generated, reference, "Inception", 5)
    assert generation_metrics(generated, reference, "Inception", 5) == first
    assert generation_metrics(generated, reference, "Inception", 6)["KID"] != first["KID"]


def test_too_few_images_are_reported() -> None:
    check_num_images(MIN_IMAGES, MIN_IMAGES)
    for sizes, message in (((19, 30), "num_images"), ((30, 19), "reference images")):
        with pytest.raises(InputError, match=f"{message} must be >= 20.*"):
            generation_metrics(outputs(0, sizes[0]), outputs(1, sizes[1]), "Inception", 0)
    with pytest.raises(InputError, match=r"num_images must be >= 2 .*, got 1"):
        frechet_distance(normal(0, 5, 3), normal(1, 1, 3))


def uint8_images(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def literal_ssim(image_a: np.ndarray, image_b: np.ndarray) -> float:
    """Wang et al. 2004 on one channel in [0, 1], by loops, where the window fits."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(image_a.shape[0] - 10):
        for j in range(image_a.shape[1] - 10):
            a, b = image_a[i : i + 11, j : j + 11], image_b[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a = (window * (a - mean_a) ** 2).sum()
            variance_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
            values.append(
                luminance * (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
            )
    return float(np.mean(values))


@pytest.mark.parametrize("channels", [1, 4])
def test_image_errors_equal_their_literal_definitions(channels: int) -> None:
    reference = uint8_images(0, 2, channels, 13, 16)
    noise = uint8_images(1, 2, channels, 13, 16).int() % 21 - 10
    reconstruction = (reference.int() + noise).clamp(0, 255).to(torch.uint8)
    errors = image_errors(reference, reconstruction)
    for i in range(2):
        a, b = reference[i].double().numpy() / 255, reconstruction[i].double().numpy() / 255
        mean_squared_error = float(((a - b) ** 2).mean())
        assert errors.rmse[i].item() == pytest.approx(mean_squared_error**0.5, rel=1e-12)
        assert errors.psnr[i].item() == pytest.approx(10 * math.log10(1 / mean_squared_error))
        expected = np.mean([literal_ssim(*pair) for pair in zip(a, b, strict=True)])
        assert errors.ssim[i].item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("level", [1, 128, 200, 250])
def test_ssim_of_almost_flat_images_is_exact(level: int) -> None:
    # The variances are differences of almost equal numbers here.
    reference = torch.full((1, 1, 16, 16), level, dtype=torch.uint8)
    reference[..., 8:] += 1
    reconstruction = reference.flip(-1)
    pair = (image[0, 0].double().numpy() / 255 for image in (reference, reconstruction))
    ssim = image_errors(reference, reconstruction).ssim.item()
    assert ssim == pytest.approx(literal_ssim(*pair), abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(1, 6))
def test_the_rmse_of_a_set_is_over_all_its_values_however_it_is_split(
    seed: int, num_images: int
) -> None:
    reference = uint8_images(seed, num_images, 3, 11, 12)
    reconstruction = uint8_images(seed + 1, num_images, 3, 11, 12)
    parts = [image_errors(a[None], b[None]) for a, b in zip(reference, reconstruction, strict=True)]
    whole = ImageErrors(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    expected = ((reference.double() - reconstruction.double()) / 255).square().mean().sqrt()
    summary = reconstruction_metrics(whole)
    assert summary["RMSE"] == pytest.approx(expected.item(), rel=1e-12)
    assert summary == pytest.approx(reconstruction_metrics(image_errors(reference, reconstruction)))


def test_exact_images_are_counted_and_left_out_of_the_psnr() -> None:
    reference = uint8_images(0, 2, 3, 16, 16)
    reconstruction = torch.stack([reference[0], 255 - reference[1]])
    errors = image_errors(reference, reconstruction)
    summary = reconstruction_metrics(errors)
    assert summary["num_exact_images"] == 1
    assert summary["PSNR"] == errors.psnr[1].item()
    assert errors.ssim[0].item() == pytest.approx(1)
    all_exact = reconstruction_metrics(image_errors(reference, reference))
    assert all_exact["PSNR"] == math.inf
    assert all_exact["num_exact_images"] == 2


def test_images_smaller_than_the_window_are_rejected() -> None:
    images = uint8_images(0, 1, 3, 16, 10)
    with pytest.raises(InputError, match="image_size must be >= 11 for SSIM, got 10"):
        image_errors(images, images)


MAPS = (
    CodeMapConfig(height=2, width=3, codebook_sizes=(4,), code_dim=8),
    CodeMapConfig(height=4, width=6, codebook_sizes=(8, 16), code_dim=8),
)


def random_indices(seed: int, num_images: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.stack(
            [
                torch.randint(0, size, (num_images, m.height, m.width), generator=generator)
                for size in m.codebook_sizes
            ],
            dim=1,
        )
        for m in MAPS
    ]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.lists(st.integers(0, 7), min_size=1, max_size=5).map(sorted))
def test_usage_is_of_the_whole_set_however_it_is_batched(seed: int, cuts: list[int]) -> None:
    indices = random_indices(seed, 7)
    whole = CodeUsage(MAPS)
    whole.update(indices)
    processes = [CodeUsage(MAPS), CodeUsage(MAPS)]
    for i, (start, stop) in enumerate(pairwise([0, *cuts, 7])):
        processes[i % 2].update([group[start:stop] for group in indices])
    summed = CodeUsage(MAPS)
    summed.counts = [a + b for a, b in zip(*(p.counts for p in processes), strict=True)]
    assert summed.perplexity() == whole.perplexity()
    assert summed.usage() == whole.usage()
    literal = [np.bincount(indices[1][:, i].flatten(), minlength=k) for i, k in ((0, 8), (1, 16))]
    for counts, expected in zip(whole.counts[1:], literal, strict=True):
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_perplexity_lies_between_one_and_the_number_of_used_codes(counts: list[int]) -> None:
    shares = [c / sum(counts) for c in counts if c]
    expected = math.prod(p**-p for p in shares)
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected, rel=1e-9)
    assert 1 <= perplexity(torch.tensor(counts)) <= len(shares) * (1 + 1e-9)


def test_uniform_use_has_all_bits_of_the_codebook_and_a_single_code_none() -> None:
    uniform, single = CodeUsage(MAPS), CodeUsage(MAPS)
    uniform.counts = [torch.full((size,), 6) for size in (4, 8, 16)]
    assert uniform.perplexity() == pytest.approx([4, 8, 16])
    assert uniform.usage() == [1, 1, 1]
    assert uniform.nominal_bits() == pytest.approx([6 * 2, 24 * 3, 24 * 4])
    assert uniform.marginal_bits() == pytest.approx(uniform.nominal_bits())
    single.update([torch.zeros_like(group) for group in random_indices(0, 3)])
    assert single.perplexity() == [1, 1, 1]
    assert single.usage() == [1 / 4, 1 / 8, 1 / 16]
    assert str(single.marginal_bits()) == "[0.0, 0.0, 0.0]"


def test_an_index_outside_its_codebook_is_caught() -> None:
    indices = random_indices(0, 2)
    indices[0][0, 0, 0, 0] = 4
    with pytest.raises(AssertionError, match="outside its codebook"):
        CodeUsage(MAPS).update(indices)
