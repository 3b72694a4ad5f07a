"""Laws of the probes, and the page that shows what they found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import features
from benchmarks.probes import (
    Labeled,
    neighbor_accuracies,
    neighbor_distances,
    principal_components,
    probe,
    ridge_accuracies,
)


def blobs(count: int, seed: int, spread: float = 0.1) -> Labeled:
    """Three classes around points of their own, and a feature that never changes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    centers = torch.tensor([[1.0, 0, 0, 5], [0, 1, 0, 5], [0, 0, 1, 5]])
    noise = torch.randn(count, 4, generator=generator) * torch.tensor([1.0, 1, 1, 0])
    return Labeled(centers[labels] + spread * noise, labels)


def test_separate_classes_are_told_apart_and_shuffled_ones_are_not() -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    found = probe(train, test)
    assert (found.dim, found.linear, found.neighbors) == (3, 1.0, 1.0)
    shuffled = train.labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    chance = probe(Labeled(train.features, shuffled), test)
    assert max(chance.linear, chance.neighbors) < 0.6


def test_the_linear_probe_is_least_squares_with_a_penalty() -> None:
    train, test = blobs(60, 0, 1.0), blobs(500, 1, 1.0)
    x, y = train.features.double().numpy(), np.eye(3)[train.labels]
    centered = np.concatenate([x - x.mean(0), np.sqrt(0.3 * 60) * np.eye(4)])
    weights = np.linalg.lstsq(centered, np.concatenate([y - y.mean(0), np.zeros((4, 3))]))[0]
    outputs = (test.features.double().numpy() - x.mean(0)) @ weights + y.mean(0)
    expected = (outputs.argmax(1) == test.labels.numpy()).mean()
    assert ridge_accuracies(train, test, [0.3]) == [pytest.approx(expected)]


def test_neighbors_vote() -> None:
    train, test = blobs(60, 0, 1.0), blobs(200, 1, 1.0)
    distances = np.linalg.norm(test.features[:, None] - train.features[None], axis=2)
    for number in (1, 7):
        nearest = train.labels.numpy()[distances.argsort(1)[:, :number]]
        votes = np.array([np.bincount(row, minlength=3).argmax() for row in nearest])
        expected = (votes == test.labels.numpy()).mean()
        assert neighbor_accuracies(train, test, [number]) == [pytest.approx(expected)]


def test_the_distance_is_that_to_the_neighbor_of_this_number() -> None:
    train, test = blobs(30, 0).features[:, :3], blobs(8, 1).features[:, :3]
    standard = [(own - train.mean(0)) / train.std(0) for own in (train, test)]
    units = [own / own.norm(dim=1, keepdim=True) for own in standard]
    expected = (units[1][:, None] - units[0]).norm(dim=2).sort(1).values[:, 4]
    found = neighbor_distances(train, test, 5)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)


def test_principal_components_keep_the_most_variance() -> None:
    train, test = torch.randn(50, 8).double(), torch.randn(20, 8).double()
    reduced, other = principal_components(train, test, 3)
    values = torch.linalg.svdvals(train - train.mean(0))
    assert reduced.square().sum() == pytest.approx(values[:3].square().sum().item())
    assert (other.shape, reduced.mean().abs().item()) == ((20, 3), pytest.approx(0, abs=1e-12))


def test_everything_is_probed_once(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "run" / "tokenizer")
    monkeypatch.setattr(features, "MODELS", {"ours": "run"})
    budget = features.CPU._replace(num_train=64, num_test=16)
    rows = features.measure(tmp_path, budget)
    names = {row["features"] for row in rows}
    assert len(names) == len(rows) == 2 + 2 + 2 * 3
    assert {"pixels", "8 principal components of pixels", "pooled features"} < names
    monkeypatch.setattr(features, "probe", None)
    assert features.measure(tmp_path, budget) == rows


def test_the_page_shows_the_table_of_the_committed_results() -> None:
    text = features.PAGE.read_text()
    section = text.partition("<!-- features-cpu -->\n")[2].partition("\n<!-- /features-cpu -->")[0]
    facts = json.loads((features.RESULTS / "features_cpu.json").read_text())
    assert section == features.table(facts)
