"""Metrics by blocks: those of torch-fidelity, which takes whole matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from pipelines.evaluation import metrics, rows, streaming
from pipelines.evaluation.features import FeatureOutput
from pipelines.evaluation.metrics import generation_metrics
from pipelines.evaluation.rows import Rows, StoredRows
from pipelines.evaluation.streaming import fit_gaussian


def sides(number: int = 90, others: int = 70) -> tuple[FeatureOutput, FeatureOutput]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    generated = FeatureOutput(draw(number, 12) * 0.9 + 5, draw(number, 7) * 3)
    return generated, FeatureOutput(draw(others, 12) + 5, draw(others, 7))


def whole_matrices(generated: FeatureOutput, reference: FeatureOutput) -> dict[str, float]:
    """What version 0.2 reported: torch-fidelity's functions on all features in float64."""
    assert isinstance(generated.features, Tensor)
    assert isinstance(reference.features, Tensor)
    ours, theirs = generated.features.double(), reference.features.double()
    gaussians = [fid_features_to_statistics(own) for own in (ours, theirs)]
    found = fid_statistics_to_metric(*gaussians, verbose=False)
    found |= isc_features_to_metric(generated.logits, 10, rng_seed=4)
    found |= kid_features_to_metric(
        ours,
        theirs,
        kid_subsets=metrics.KID_SUBSETS,
        kid_subset_size=min(metrics.KID_SUBSET_SIZE, len(ours), len(theirs)),
        rng_seed=4,
        verbose=False,
    )
    found |= prc_features_to_metric(
        ours, theirs, prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    names = {
        "FID": KEY_METRIC_FID,
        "IS": KEY_METRIC_ISC_MEAN,
        "KID": KEY_METRIC_KID_MEAN,
        "precision": KEY_METRIC_PRECISION,
        "recall": KEY_METRIC_RECALL,
    }
    return {name: found[key] for name, key in names.items()}


def stored(folder: Path, share_size: int, output: FeatureOutput) -> FeatureOutput:
    """The same in files of `share_size` rows."""
    starts = range(0, len(output.features), share_size)
    paths = tuple(folder / f"{start}.safetensors" for start in starts)
    columns = output._asdict()
    for start, path in zip(starts, paths, strict=True):
        part = {name: own[start : start + share_size].clone() for name, own in columns.items()}
        save_file(part, path)
    return FeatureOutput(
        *(StoredRows(paths, name, share_size, tuple(own.shape)) for name, own in columns.items())
    )


@pytest.fixture(params=[2000, 16], ids=["one block", "many blocks"])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (rows, streaming):
        monkeypatch.setattr(module, "BLOCK_ROWS", request.param)
    number: int = request.param
    return number


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("subset_size", [1000, 30])
def test_blocks_and_shares_give_the_figures_of_whole_matrices(
    block_rows: int,
    is_stored: bool,
    subset_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", subset_size)
    pair = sides()
    expected = whole_matrices(*pair)
    if is_stored:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        pair = stored(tmp_path / "a", 25, pair[0]), stored(tmp_path / "b", 25, pair[1])
    found = generation_metrics(*pair, "Inception", 4)
    assert 0 < expected["precision"] < 1
    exact = ("KID", "precision", "recall", *(["FID"] if block_rows > 90 else []))
    for name, value in expected.items():
        assert found[name] == (value if name in exact else pytest.approx(value, rel=1e-10)), name


def test_merged_blocks_lose_no_digits_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK_ROWS", 64)
    near = torch.randn(1000, 5, dtype=torch.float64)
    far = near + 1e7
    exact = np.cov(near.numpy(), rowvar=False)
    found = fit_gaussian(far)
    raw = far.T @ far / 999 - 1000 / 999 * torch.outer(far.mean(0), far.mean(0))
    assert np.abs(found.covariance - exact).max() < 1e-7
    assert np.abs(raw.numpy() - exact).max() > 1e-3  # what sums of products would give


def test_stored_rows_are_read_as_those_of_a_tensor(tmp_path: Path) -> None:
    output = sides()[0]
    found: Rows = stored(tmp_path, 32, output).features
    assert isinstance(output.features, Tensor)
    assert len(found) == 90
    assert torch.equal(found[30:70], output.features[30:70])
    items = np.array([89, 0, 33, 31, 0])
    assert torch.equal(found[items], output.features[torch.from_numpy(items)])
