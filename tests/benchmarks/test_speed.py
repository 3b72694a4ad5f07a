"""The frame of the speed benchmarks; speed itself has no place in tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import quantization, sampling, training
from benchmarks.speed.__main__ import gather, main
from benchmarks.speed.library_cache import LibraryCache
from benchmarks.speed.measure import Comparison, measure, peak_memory
from benchmarks.speed.report import write_report
from benchmarks.speed.sampling import NoCache
from prior import Condition, IncrementalDecoder
from tests.prior.small_priors import assert_close, random_indices, trained_prior


def waiting(calls: list[str], name: str) -> Callable[[], Callable[[], None]]:
    return lambda: lambda: calls.append(name)


def test_contenders_are_called_in_turn_and_set_up_once() -> None:
    calls: list[str] = []
    contenders = {name: waiting(calls, name) for name in ("ours", "theirs")}
    found = measure(Comparison("order", contenders, "calls", 3.0, rounds=4))
    assert calls == ["ours", "theirs"] * 5  # once to warm up
    assert found["unit"] == "calls/s"
    ours = found["contenders"]["ours"]
    assert ours["ours_is_times_as_fast"] == 1
    low, high = ours["rate_quartiles"]
    assert low <= ours["rate"] <= high


def test_peak_memory_is_what_the_call_takes_for_a_while() -> None:
    size = 256 * 2**20  # beside which nothing else counts
    found = peak_memory(lambda: lambda: torch.ones(size, dtype=torch.uint8).max() and None)
    if found is None:
        pytest.skip("no /proc here")
    assert 0.8 * size < found < 3 * size


@pytest.mark.parametrize("part", [quantization, sampling, training])
def test_every_contender_runs(part: Any) -> None:
    for comparison in part.comparisons("tiny"):
        for set_up in comparison.contenders.values():
            set_up()()
        if part is sampling:
            assert next(iter(comparison.contenders)).startswith("static cache")
            assert comparison.details["bytes_moved"] > 4 * comparison.details["parameters"]


@pytest.mark.parametrize("order", ["coarse_to_fine", "cell"])
def test_all_caches_give_the_same_logits(order: str) -> None:
    prior = trained_prior(order, condition="none")
    codes = prior.ordering.flatten(random_indices(prior, 2))
    with torch.no_grad():
        decoder = IncrementalDecoder(prior, Condition(), 2)
        caches = [decoder, LibraryCache(prior, 2), NoCache(prior, 2)]
    for step, slot in prior.ordering.mask.nonzero().tolist():
        with torch.no_grad():
            first, *others = [cache.next_logits() for cache in caches]
        for logits in others:
            assert_close([logits], [first], 1e-5)
        with torch.no_grad():
            for cache in caches:
                cache.append(codes[:, step, slot])


def test_the_table_is_written_from_what_was_gathered(tmp_path: Path) -> None:
    metadata = measure(Comparison("a row", {"ours": lambda: lambda: None}, "calls", 1.0, 1))
    run = tmp_path / "run" / "sampling"
    run.mkdir(parents=True)
    (run / "a-row.json").write_text(json.dumps(metadata))
    page = tmp_path / "README.md"
    page.write_text("<!-- speed-tiny -->\n<!-- /speed-tiny -->\n")
    gather(tmp_path / "run", tmp_path / "speed_tiny.json")
    (run / "a-row.json").unlink()
    gather(tmp_path / "run", tmp_path / "speed_tiny.json")  # what is there stays
    write_report(tmp_path, "tiny", page)
    assert "| **sampling**: a row | **ours** |" in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1"),
        (["--budget", "gpu"], "--budget gpu needs a CUDA device"),
        (["--report", "--run-dir", "none", "--results", "none"], "nothing has been measured yet"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["speed", *options])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # For all tests that follow: bits depend on the number of threads.
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert message in f"{caught.value}{capsys.readouterr().err}"
