"""The fault benchmark in short: nothing is lost."""

import json
from pathlib import Path

import pytest

from tests.faults import __main__ as faults
from tests.faults import disk, kills, processes
from tests.faults.tally import Tally


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the undisturbed runs are made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
def test_killed_runs_equal_undisturbed_ones(folder: Path) -> None:
    assert kills.run(folder, 4, seed=0) == Tally(4, 4, 0, [])


def test_damaged_files_and_folders_that_cannot_be_written_are_refused(folder: Path) -> None:
    num_trials = disk.TRIALS_PER_DISK + 1
    assert disk.run(folder, num_trials, seed=0) == Tally(num_trials, num_trials, 0, [])


def test_processes_notice_a_death_and_count_every_image_once(folder: Path) -> None:
    assert processes.run(folder, 3, seed=0) == Tally(3, 3, 0, [])


def test_a_finished_family_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "RESULTS", tmp_path / "faults.json")
    counted = []

    def run(folder: Path, num_trials: int, seed: int) -> Tally:
        counted.append((num_trials, seed))
        return Tally(num_trials, num_trials - 1, 1, ["one was lost"])

    monkeypatch.setattr(kills, "run", run)
    for _ in range(2):
        faults.run_family("kills", tmp_path, None, 3)
    assert counted == [(kills.NUM_TRIALS, 3)]
    results = faults.collect(tmp_path)
    assert results == json.loads((tmp_path / "faults.json").read_text())
    assert results["kills"].keys() >= {"command", "commit", "seconds", "machine", "seed"}
    lines = faults.table(results).splitlines()
    assert lines[1].split() == ["kills", "80", "79", "1"]
    assert lines[2] == "kills: one was lost"
