"""Laws of what is measured of images and of the scores that call them unusual."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from pipelines.evaluation.anomaly import SCORES, AnomalyScorer, auroc, png_bits_per_dim
from pipelines.images import to_float, to_pil
from tests.faults.files import small_pipeline
from tests.image_files import noise
from tests.pipelines.coding.test_models import pipeline_of
from tokenizer import InputError


def pictures(count: int, seed: int = 0) -> Tensor:
    """Noise of several strengths, on gray."""
    pixels = np.stack([noise(16, 16, seed=seed + number) for number in range(count)]).astype(float)
    strengths = np.linspace(0.2, 1, count)[:, None, None, None]
    mixed = (128 + strengths * (pixels - 128)).astype(np.uint8)
    return torch.from_numpy(mixed).movedim(-1, 1).contiguous()


@pytest.fixture(scope="module")
def scorer() -> AnomalyScorer:
    """By both priors."""
    pipeline = small_pipeline()
    return AnomalyScorer(pipeline.tokenizer, pipeline.prior, pictures(20))


def test_bits_are_those_of_the_priors_and_stand_where_the_codes_are(scorer: AnomalyScorer) -> None:
    images = pictures(5, seed=50)
    codes = scorer.tokenizer.encode(to_float(images))
    measured = scorer.measure(images)
    assert list(measured.bits) == ["prior", "own"]
    assert scorer.prior is not None
    torch.testing.assert_close(measured.bits["own"], scorer.tokenizer.code_length(codes))
    expected = scorer.prior.bits_per_image(codes).double()
    torch.testing.assert_close(measured.bits["prior"].sum(1), expected, rtol=1e-5, atol=1e-3)
    surprise = scorer.surprise(images).double()
    torch.testing.assert_close(surprise.sum((1, 2)), expected, rtol=1e-5, atol=1e-3)
    # One code of the coarse map stands above 8 by 8 pixels, one of the fine map above 4 by 4.
    assert all(len(row.unique()) <= 16 for row in surprise)


def test_the_bound_is_that_of_the_tokenizer_under_its_own_prior() -> None:
    tokenizer = small_pipeline().tokenizer
    scorer = AnomalyScorer(tokenizer, None, pictures(20))
    images = pictures(5, seed=50)
    measured = scorer.measure(images)
    assert list(measured.bits) == ["own"]
    bound = tokenizer.evidence_lower_bound(
        to_float(images), scorer.decoder_variance, codes="nearest"
    )
    torch.testing.assert_close(measured.bits_per_dim, bound.bits_per_dim, rtol=1e-6, atol=1e-6)
    root = (bound.squared_errors.double() / images[0].numel()).sqrt() / 2
    torch.testing.assert_close(measured.rmse, root, rtol=1e-5, atol=1e-6)
    assert scorer.decoder_variance == pytest.approx(
        4 * scorer.reference.rmse.square().mean().item(), rel=1e-5
    )


def test_the_scores_are_their_formulas(scorer: AnomalyScorer) -> None:
    reference, measured = scorer.reference, scorer.measure(pictures(5, seed=50))
    scores = scorer.scores(measured)
    assert scores.keys() == SCORES.keys()
    bound = measured.bits_per_dim
    torch.testing.assert_close(scores["code_bits"], measured.bits["prior"].sum(1))
    torch.testing.assert_close(scores["typicality"], (bound - reference.bits_per_dim.mean()).abs())
    torch.testing.assert_close(scores["complexity"], bound - measured.png_bits_per_dim)
    usual, unusual = reference.statistics().numpy(), measured.statistics().numpy()
    spread = np.maximum(usual.std(0, ddof=1), 1e-3)
    covariance = np.cov(usual / spread, rowvar=False) + 1e-3 * np.eye(len(spread))
    inverse = np.linalg.inv(covariance)
    expected = [mahalanobis(row / spread, usual.mean(0) / spread, inverse) for row in unusual]
    np.testing.assert_allclose(scores["joint"], expected, rtol=1e-6)


def test_what_is_like_nothing_in_the_reference_stands_out(scorer: AnomalyScorer) -> None:
    usual = scorer.scores(scorer.measure(pictures(10, seed=70)))["joint"]
    flat = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    assert scorer.scores(scorer.measure(flat))["joint"].min() > usual.max()


def test_a_complex_image_has_a_long_png() -> None:
    images = torch.cat([torch.zeros(1, 3, 16, 16, dtype=torch.uint8), pictures(2)])
    flat, weak, strong = png_bits_per_dim(images).tolist()
    assert flat < weak < strong
    assert 8 < strong < 9  # noise cannot be compressed
    gray = png_bits_per_dim(images[:, :1])
    assert len(to_pil(images[0, :1]).getbands()) == 1
    assert gray[0] > flat  # a header over fewer values


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    usual = torch.randint(5, (30,), generator=generator).double()
    unusual = torch.randint(8, (20,), generator=generator).double()
    wins = (unusual[:, None] > usual).double() + 0.5 * (unusual[:, None] == usual).double()
    assert auroc(usual, unusual) == pytest.approx(wins.mean().item())
    assert auroc(usual, usual + 10) == 1.0
    assert math.isclose(auroc(usual, usual), 0.5)


def test_what_cannot_score_is_refused() -> None:
    with_null, without = pipeline_of("cell"), pipeline_of("cell", num_classes=1)
    for prior, count, message in (
        (None, 5, "run_dir must hold a prior, or a tokenizer with a prior of its own"),
        (without.prior, 5, "a prior with a null condition"),
        (with_null.prior, 1, "at least 2 reference images, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            AnomalyScorer(with_null.tokenizer, prior, pictures(count))
