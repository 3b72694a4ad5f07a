"""The trials of faults in short: nothing is lost, and what would be lost is noticed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.sampling_config import SamplingConfig
from tests.faults import __main__ as faults
from tests.faults import checkpoints, configuration, jobs, kills
from tokenizer import TokenizerConfig
from tokenizer.storage.configs import StrictConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the undisturbed runs are made once."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        pytest.param("kills", [0, 3], marks=pytest.mark.slow),
        pytest.param("disk", [0, 1, 2, 3, 4, 5, 10, 21], marks=pytest.mark.slow),
        pytest.param("data", range(4), marks=pytest.mark.slow),
        ("configuration", range(60)),
        ("checkpoints", range(40)),
        ("numbers", range(8)),
        ("processes", [0, 3]),
        ("files", range(12)),
        pytest.param("memory", [0, 2, 4, 7], marks=pytest.mark.slow),
    ],
)
def test_no_trial_is_lost(family: str, numbers: list[int], folder: Path) -> None:
    assert faults.run_trials(family, folder, numbers, seed=1) == []


def test_a_message_must_name_the_field_on_one_line() -> None:
    for message, names, complaint in (
        ("channels: must be 3", ["channels"], ""),
        ("groups: must be 3", ["channels"], "not named"),
        ("something is wrong", [], "no field"),
        ("channels\nare wrong", ["channels"], "printable"),
        ("channels " * 1000, ["channels"], "printable"),
    ):
        assert complaint in configuration.wrong_message(message, TokenizerConfig, names)
    assert not configuration.wrong_message("channels: must be 3", TokenizerConfig, ["channels"])


def test_a_config_that_does_not_work_is_lost() -> None:
    def fail(config: StrictConfig) -> None:
        raise RuntimeError("a bug")

    assert configuration.attempt(SamplingConfig, fail, {}, []) == "RuntimeError: a bug"


def test_a_folder_that_loads_or_crashes_is_lost() -> None:
    assert not checkpoints.judge("refused: x must be y", is_valid=False)
    assert not checkpoints.judge("loaded", is_valid=True)
    for outcome in ("loaded", "MemoryError: ", "refused: a\nb", "refused: " + "x" * 10_000):
        assert checkpoints.judge(outcome, is_valid=False)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by address space")
def test_memory_and_pickles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(folder: Path) -> None:
        torch.zeros(2**30)

    def unpickle(folder: Path) -> None:
        torch.save({"a": checkpoints.Payload(tmp_path)}, tmp_path / "file")
        torch.load(tmp_path / "file", weights_only=False)

    for function, outcome in ((allocate, "alloc"), (unpickle, "pickle.find_class")):
        monkeypatch.setattr(ImageGenerationPipeline, "from_pretrained", function)
        load = lambda: checkpoints.load(tmp_path)  # noqa: E731
        assert outcome in jobs.in_child(load, checkpoints.MEMORY, checkpoints.SECONDS)


def test_a_finished_family_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "RESULTS", tmp_path / "faults.json")
    monkeypatch.setattr(kills, "NUM_TRIALS", 3)
    tried = []

    def trial(folder: Path, number: int, generator: object) -> str:
        tried.append(number)
        return "went wrong" if number == 1 else ""

    monkeypatch.setattr(kills, "trial", trial)
    for _ in range(2):
        faults.record_family("kills", tmp_path, None, 3)
    assert tried == [0, 1, 2]
    results = faults.collect(tmp_path)
    assert results == json.loads((tmp_path / "faults.json").read_text())
    assert results["kills"].keys() >= {"command", "commit", "seconds", "machine", "seed"}
    assert results["kills"]["notes"] == ["trial 1: went wrong"]
    assert faults.table(results).splitlines()[2] == "| kills | 3 | 2 | 1 |"
