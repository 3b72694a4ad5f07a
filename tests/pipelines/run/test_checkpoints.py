"""The state of a run: whole or refused, and never lost."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pipelines.run.checkpoints import TrainingState, load_state, save_state
from pipelines.run.log import RunLog
from pipelines.run.manifest import read_manifest, write_manifest
from tests.image_files import flip_bit
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file

FILES = ("network", "network_ema", "network_optimizer")


def make_state(step: int) -> TrainingState:
    weights = {"weight": torch.randn(3, 2).T, "count": torch.tensor(step)}
    moments = {"weight.step": torch.tensor(1.0), "weight.exp_avg": torch.randn(3)}
    tensors = dict(zip(FILES, (weights, {"weight": torch.randn(2, 3)}, moments), strict=True))
    return TrainingState(step, tensors, {"training images": "12ab"}, "34cd")


def assert_equal(loaded: TrainingState | None, saved: TrainingState) -> None:
    assert loaded is not None
    assert loaded._replace(tensors={}) == saved._replace(tensors={})
    torch.testing.assert_close(loaded.tensors, saved.tensors, rtol=0, atol=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was_also_when_it_is_saved_again(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state") is None
    for _ in range(2):
        state = make_state(7)
        save_state(tmp_path / "state", state)
        assert_equal(load_state(tmp_path / "state"), state)
    files = [f"{name}.safetensors" for name in FILES]
    assert names(tmp_path / "state" / "step_00000007") == sorted([*files, "state.json"])


@pytest.mark.parametrize("steps", [(9, 10, 100), (99_999_998, 99_999_999, 100_000_000)])
def test_the_newest_state_and_the_one_before_it_are_kept_and_what_is_not_ours(
    steps: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    (folder / "step_00000009.bak").mkdir(parents=True)
    (folder / "step_00000001.txt").write_text("x")
    (folder / "step_00000200").write_text("x")
    strange = names(folder)
    states = [make_state(step) for step in steps]
    for state in states:
        save_state(folder, state)
    assert_equal(load_state(folder), states[-1])
    assert names(folder) == sorted([*strange, *(f"step_{step:08d}" for step in steps[1:])])


def test_a_state_that_was_only_half_written_does_not_count(tmp_path: Path) -> None:
    """A killed run leaves a folder under a temporary name; one that fails leaves none."""
    state = make_state(7)
    save_state(tmp_path / "state", state)
    half = tmp_path / "state" / ".step_00000008.tmp"
    half.mkdir()
    (half / "network.safetensors").write_bytes(b"half")
    assert_equal(load_state(tmp_path / "state"), state)
    broken = make_state(8)._replace(tensors={"network": {"weight": "no tensor"}})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        save_state(tmp_path / "state", broken)
    assert_equal(load_state(tmp_path / "state"), state)
    assert names(tmp_path / "state") == ["step_00000007"]


@pytest.mark.parametrize("name", FILES)
def test_a_state_with_a_changed_bit_or_without_a_file_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    save_state(tmp_path / "state", make_state(7))
    path = tmp_path / "state" / "step_00000007" / f"{name}.safetensors"
    for damage in (lambda: flip_bit(path, -1), path.unlink):
        damage()
        with pytest.raises(InputError, match=rf"{name}\.safetensors is damaged"):
            load_state(tmp_path / "state")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", "{}", '{"step": 7}'])
def test_a_state_without_a_whole_manifest_is_refused(tmp_path: Path, text: str) -> None:
    save_state(tmp_path / "state", make_state(7))
    path = tmp_path / "state" / "step_00000007" / "state.json"
    whole = path.read_text()
    digits = [place for place, letter in enumerate(whole) if letter.isdigit()]
    for damaged in (
        text,
        *(whole[:at] + chr(ord(whole[at]) ^ 1) + whole[at + 1 :] for at in digits[len(text) :: 9]),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"state\.json is damaged"):
            load_state(tmp_path / "state")


def test_a_state_of_another_step_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7))
    folder = tmp_path / "state" / "step_00000007"
    fields = read_manifest(folder / "state.json")
    (folder / "state.json").unlink()
    write_manifest(folder / "state.json", {**fields, "format": 4})
    with pytest.raises(InputError, match=r"later version: format must be at most 3, got 4"):
        load_state(tmp_path / "state")
    folder.rename(tmp_path / "state" / "step_00000008")
    write_manifest(tmp_path / "state" / "step_00000008" / "state.json", fields)
    with pytest.raises(InputError, match=r"state\.json is damaged: it is of step 7"):
        load_state(tmp_path / "state")


# The checkpoint before


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """States 7 and 8; the newer one is damaged."""
    for step in (7, 8):
        torch.manual_seed(step)
        save_state(tmp_path / "state", make_state(step))
    path = tmp_path / "state" / "step_00000008" / "network_ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return tmp_path / "state"


def test_the_state_before_a_damaged_one_is_named_and_taken_only_when_asked(damaged: Path) -> None:
    with pytest.raises(InputError, match=r"_ema\.safetensors .*--resume-from step_00000007 to go"):
        load_state(damaged)
    with pytest.raises(InputError, match="step_00000007"):
        load_state(damaged, "step_00000008")
    torch.manual_seed(7)
    assert_equal(load_state(damaged, "step_00000007"), make_state(7))


def test_when_both_are_damaged_the_way_out_is_to_start_anew(damaged: Path) -> None:
    (damaged / "step_00000007" / "state.json").write_text("{")
    with pytest.raises(InputError, match="it is not JSON; step_00000008 is damaged, too: remove"):
        load_state(damaged, "step_00000007")
    shutil.rmtree(damaged / "step_00000007")
    with pytest.raises(InputError, match=f"there is none before it: remove {damaged.parent} to"):
        load_state(damaged)


def test_the_newest_state_is_taken_as_long_as_it_is_whole(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the same command, with its option, can be repeated."""
    with pytest.raises(InputError, match="got step_00000001: step_00000007, step_00000008"):
        load_state(damaged, "step_00000001")
    with pytest.raises(InputError, match="no checkpoint"):
        load_state(damaged / "none", "step_00000001")
    state = make_state(9)
    save_state(damaged, state)
    assert_equal(load_state(damaged, "step_00000008"), state)
    assert "step_00000009 is whole: going on from it, not from step_00000008" in caplog.text


def test_a_damaged_state_makes_way_for_the_one_that_is_saved_again(damaged: Path) -> None:
    state = make_state(8)
    save_state(damaged, state)
    assert_equal(load_state(damaged), state)
    assert names(damaged) == ["step_00000007", "step_00000008"]
    (damaged / "step_00000008").rename(damaged / "step_00000010")  # damaged now, as of step 8
    save_state(damaged, make_state(9))
    assert names(damaged) == ["step_00000007", "step_00000009"]


# On the disk, in this order


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed to the disk, and what is renamed, by name and in order."""
    found: list[tuple[str, str]] = []
    flush = os.fsync

    def name_of(path: str | Path) -> str:
        return re.sub(r"tmp[0-9a-f]+$", "tmp", Path(path).name)

    def recorded_flush(descriptor: int) -> None:
        found.append(("flush", name_of(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_flush)
    for real in (Path.rename, Path.replace):

        def recorded(path: Path, target: Path, real: Any = real) -> Path:
            found.append(("rename", name_of(target)))
            return real(path, target)

        monkeypatch.setattr(Path, real.__name__, recorded)
    return found


def test_what_counts_is_on_the_disk_before_it_counts(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    save_state(tmp_path / "state", make_state(7))
    renamed = events.index(("rename", "step_00000007"))
    files = [*(f"{name}.safetensors" for name in FILES), "state.json"]
    assert set(events[:renamed]) == {("flush", name) for name in [*files, ".step_00000007.tmp"]}
    assert events[renamed + 1 :] == [("flush", "state")]
    events.clear()
    replace_file(tmp_path / "a.json", lambda path: path.write_text("x"))
    folder = ("flush", tmp_path.name)
    assert events == [("flush", ".a.json.tmp"), ("rename", "a.json"), folder]
    with RunLog(tmp_path, Accelerator(), 0) as log:
        events.clear()
        log.write(1, "train", {"loss": 1.0})
        log.flush()  # a state is about to rely on it
        assert events == [("flush", "metrics.jsonl")]
