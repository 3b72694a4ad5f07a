"""The benchmark of bits and errors: curves, baselines with a rate term, cells end to end."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.rate import __main__ as command
from benchmarks.rate.cells import BUDGETS, cells_of, run_config
from benchmarks.rate.curves import Point, bd_rate, front, ratio_at_equal_error
from benchmarks.rate.rated import RatedNearestQuantizer
from benchmarks.rate.report import PAGE, against_greedy, rows_of, table
from pipelines.config import DataConfig
from tokenizer.builders import rq_vae
from tokenizer.config import NearestQuantizerConfig
from tokenizer.quantizers.nearest import NearestQuantizer

CURVE = [Point(0.08, 500.0), Point(0.04, 1000.0), Point(0.02, 2000.0)]


def at(psnr: float, bits: float) -> Point:
    return Point(10 ** (-psnr / 20), bits)


def test_a_front_has_no_point_that_another_one_beats() -> None:
    points = [*CURVE, Point(0.05, 1200.0), Point(0.08, 600.0)]
    assert front(points) == sorted(CURVE)


def test_a_ratio_is_read_off_straight_lines_between_logarithms() -> None:
    ratio = ratio_at_equal_error(Point(0.04 * math.sqrt(2), 0.7 * 1000 / math.sqrt(2)), CURVE)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.7)
    assert not ratio.is_extrapolated
    beyond = ratio_at_equal_error(Point(0.01, 2000.0), CURVE)
    assert beyond is not None
    assert beyond.value == pytest.approx(0.5)
    assert beyond.is_extrapolated
    assert ratio_at_equal_error(Point(0.03, 1.0), CURVE[:1]) is None
    assert ratio_at_equal_error(Point(0.03, 1.0), []) is None


def test_a_bd_rate_is_the_mean_of_the_logarithms_where_both_curves_are() -> None:
    # log bits = a + b·PSNR on both: the mean difference over [26, 30] is that at 28.
    reference = [at(psnr, math.exp(2 + 0.15 * psnr)) for psnr in (24, 27, 30)]
    points = [at(psnr, math.exp(1.5 + 0.16 * psnr)) for psnr in (26, 29, 33)]
    expected = math.exp(1.5 + 0.16 * 28 - 2 - 0.15 * 28) - 1
    assert bd_rate(points, reference) == pytest.approx(expected)
    fewer = [point._replace(bits=0.8 * point.bits) for point in reference]
    assert bd_rate(fewer, reference) == pytest.approx(-0.2)
    assert bd_rate([at(40, 1.0), at(41, 2.0)], reference) is None
    assert bd_rate(reference[:1], reference) is None


@pytest.mark.parametrize("name", BUDGETS)
def test_cells_of_a_shape_differ_in_quantizer_prior_and_rates_alone(
    name: str, tmp_path: Path
) -> None:
    budget = BUDGETS[name]
    cells = cells_of(budget)
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.shape for cell in cells[:4]] == [budget.main[0]] * 4
    for first, second in itertools.pairwise(cells):
        pair = [run_config(cell, budget, DataConfig(), tmp_path) for cell in (first, second)]
        assert pair[0].tokenizer.networks == pair[1].tokenizer.networks
        if first.shape == second.shape and first.seed == second.seed:
            trainings = [
                config.training.model_copy(update={"learning_rate": 1.0}) for config in pair
            ]
            assert trainings[0] == trainings[1]
            assert pair[0].tokenizer.groups == pair[1].tokenizer.groups


def test_soft_assignments_are_those_of_the_likeliest_gaussians_and_leave_codes_as_they_are() -> (
    None
):
    torch.manual_seed(0)
    group = rq_vae(4, 2, 8, 6).groups[0]
    rated = RatedNearestQuantizer(group)
    plain = NearestQuantizer(group, NearestQuantizerConfig())
    plain.load_state_dict(rated.state_dict())
    residual = torch.randn(50, 6, requires_grad=True)
    squares = (residual.unsqueeze(1) - rated.codebook(1)).square().sum(2)
    variance = squares.amin(1).mean().detach() / 6
    found = rated.log_posterior(1, residual)
    torch.testing.assert_close(found, (-squares / (2 * variance)).log_softmax(1))
    found[:, 0].sum().backward()
    assert residual.grad is not None
    assert residual.grad.abs().sum() > 0
    latents = torch.randn(2, 6, 3, 3)
    for own, other in zip(rated(latents, "nearest"), plain(latents, "nearest"), strict=True):
        if isinstance(own, torch.Tensor):
            assert torch.equal(own, other)


def test_the_command_trains_measures_reports_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--budget", "tiny", "--run-dir", str(tmp_path)]
    command.main([*words, "--cells", "k4_fair"])
    path = tmp_path / "rate_tiny.json"
    results = {row["cell"]: row for row in json.loads(path.read_text())}
    assert {*results} == {f"4x4x2-k4_{way}_seed0" for way in ("fair", "fair_prior")}
    assert str(tmp_path) not in path.read_text()
    rows = rows_of(results)
    assert len(rows) == 2 * 3
    for row in rows:
        assert 0 < row.numbers["bits"] < 2 * row.cell["nominal_bits"]
        assert sum(row.numbers["layer_bits"]) == pytest.approx(row.numbers["bits"], abs=0.1)
        if row.setting[1:4] == (False, False, "greedy"):
            ratio = against_greedy(row, [row])
            assert ratio is not None
            assert ratio.value == 1
    assert len(table(rows).splitlines()) == 2 + len(rows)
    assert (tmp_path / "rate_tiny_curves.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(results)
    command.main([*words, "--cells", "k4_fair"])
    assert not capsys.readouterr().out


def test_the_page_has_a_place_for_each_table() -> None:
    text = PAGE.read_text()
    for name in ("rate-cpu", "rate-gpu", "rate-codecs-cpu", "rate-codecs-gpu"):
        assert f"<!-- {name} -->\n" in text
        assert f"<!-- /{name} -->" in text
