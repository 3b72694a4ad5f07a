"""The state of a run: whole or refused, and never lost."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipelines.run.checkpoints import (
    TrainingState,
    check_sources,
    load_state,
    newest_sources,
    optimizer_state,
    restore_optimizer,
    save_state,
)
from pipelines.run.log import RunLog
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file


def make_state(step: int) -> TrainingState:
    model = {"weight": torch.randn(3, 2).T, "count": torch.tensor(step)}
    optimizer = {0: {"step": torch.tensor(1.0), "exp_avg": torch.randn(3)}, 12: {}}
    return TrainingState(step, model, {"weight": torch.randn(2, 3)}, optimizer)


def assert_equal(loaded: TrainingState | None, saved: TrainingState) -> None:
    assert loaded is not None
    assert loaded.step == saved.step
    for ours, theirs in ((loaded.model, saved.model), (loaded.ema, saved.ema)):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name])
    for number, tensors in saved.optimizer.items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.optimizer[number][name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_is_no_state_before_the_first(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state") is None


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = make_state(7)._replace(metrics="12ab")
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert_equal(loaded, state)
    assert loaded is not None
    assert loaded.metrics == "12ab"


def test_a_state_without_a_moving_average_comes_back_as_it_was(tmp_path: Path) -> None:
    state = make_state(7)._replace(ema={})
    save_state(tmp_path / "state", state)
    assert_equal(load_state(tmp_path / "state"), state)


def test_the_newest_state_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    states = [make_state(step) for step in (9, 10, 100)]
    for state in states:
        save_state(tmp_path / "state", state)
    assert_equal(load_state(tmp_path / "state"), states[-1])
    assert names(tmp_path / "state") == ["step_00000010", "step_00000100"]


def test_a_state_can_be_saved_again(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7))
    state = make_state(7)
    save_state(tmp_path / "state", state)
    assert_equal(load_state(tmp_path / "state"), state)


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7))
    suffixes = {path.suffix for path in (tmp_path / "state").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_a_state_that_was_only_half_written_does_not_count(tmp_path: Path) -> None:
    """A killed run leaves a folder under a temporary name."""
    state = make_state(7)
    save_state(tmp_path / "state", state)
    half = tmp_path / "state" / ".step_00000008.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert_equal(load_state(tmp_path / "state"), state)
    save_state(tmp_path / "state", make_state(9))
    assert not half.exists()


def test_the_old_state_survives_a_failure_to_write_the_new_one(tmp_path: Path) -> None:
    state = make_state(7)
    save_state(tmp_path / "state", state)
    broken = make_state(8)._replace(ema={"weight": "no tensor"})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        save_state(tmp_path / "state", broken)
    assert_equal(load_state(tmp_path / "state"), state)
    assert names(tmp_path / "state") == ["step_00000007"]


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_state_with_a_changed_bit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save_state(tmp_path / "state", make_state(7))
    path = tmp_path / "state" / "step_00000007" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}\.safetensors is damaged"):
        load_state(tmp_path / "state")
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}\.safetensors is damaged"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", "null", "{}", json.dumps({"step": 7})]
)
def test_a_state_without_a_whole_manifest_is_refused(tmp_path: Path, text: str) -> None:
    save_state(tmp_path / "state", make_state(7))
    (tmp_path / "state" / "step_00000007" / "state.json").write_text(text)
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        load_state(tmp_path / "state")


def digits(text: str) -> list[int]:
    return [place for place, letter in enumerate(text) if letter.isdigit()]


def test_a_manifest_with_another_digit_anywhere_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7)._replace(sources={"training images": "12ab"}))
    path = tmp_path / "state" / "step_00000007" / "state.json"
    text = path.read_text()
    for place in digits(text)[::7]:
        changed = chr(ord(text[place]) ^ 1)
        path.write_text(text[:place] + changed + text[place + 1 :])
        with pytest.raises(InputError, match=r"state\.json is damaged"):
            load_state(tmp_path / "state")


def test_a_state_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7))
    (tmp_path / "state" / "step_00000007").rename(tmp_path / "state" / "step_00000008")
    with pytest.raises(InputError, match=r"state\.json is damaged: it is of step 7"):
        load_state(tmp_path / "state")


# The checkpoint before


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """States 7 and 8; the newer one is damaged."""
    for step in (7, 8):
        torch.manual_seed(step)
        save_state(tmp_path / "state", make_state(step))
    path = tmp_path / "state" / "step_00000008" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return tmp_path / "state"


def test_the_state_before_a_damaged_one_is_named_and_taken_only_when_asked(damaged: Path) -> None:
    with pytest.raises(InputError, match=r"ema\.safetensors .*--resume-from step_00000007 to go"):
        load_state(damaged)
    with pytest.raises(InputError, match="step_00000007"):
        load_state(damaged, "step_00000008")
    torch.manual_seed(7)
    assert_equal(load_state(damaged, "step_00000007"), make_state(7))


def test_when_both_are_damaged_the_way_out_is_to_start_anew(damaged: Path) -> None:
    (damaged / "step_00000007" / "state.json").write_text("{")
    with pytest.raises(InputError, match="it is not JSON; step_00000008 is damaged, too: remove"):
        load_state(damaged, "step_00000007")


def test_the_newest_state_is_taken_as_long_as_it_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the same command, with its option, can be repeated."""
    states = [make_state(step) for step in (7, 8)]
    for state in states:
        save_state(tmp_path / "state", state)
    assert_equal(load_state(tmp_path / "state", "step_00000007"), states[1])
    assert "step_00000008 is whole: going on from it, not from step_00000007" in caplog.text


def test_a_state_that_is_not_there_is_refused(damaged: Path) -> None:
    with pytest.raises(
        InputError, match=r"resume_from must .* got step_00000001: step_00000007, step_00000008"
    ):
        load_state(damaged, "step_00000001")
    with pytest.raises(InputError, match="no checkpoint"):
        load_state(damaged / "none", "step_00000001")


def test_without_a_state_before_it_the_way_out_is_to_start_anew(tmp_path: Path) -> None:
    save_state(tmp_path / "state", make_state(7))
    (tmp_path / "state" / "step_00000007" / "state.json").unlink()
    with pytest.raises(InputError, match=f"there is none before it: remove {tmp_path} to start"):
        load_state(tmp_path / "state")


def test_a_damaged_state_makes_way_for_the_one_that_is_saved_again(damaged: Path) -> None:
    state = make_state(8)
    save_state(damaged, state)
    assert_equal(load_state(damaged), state)
    assert names(damaged) == ["step_00000007", "step_00000008"]


def test_a_damaged_newer_state_goes_when_an_older_one_has_been_saved(damaged: Path) -> None:
    (damaged / "step_00000008").rename(damaged / "step_00000010")
    save_state(damaged, make_state(9))
    assert names(damaged) == ["step_00000007", "step_00000009"]


# What it was trained on


def test_a_run_is_refused_when_what_it_learns_from_has_changed(tmp_path: Path) -> None:
    sources = {"training images": "a", "validation images": "b"}
    assert newest_sources(tmp_path) is None
    check_sources(tmp_path, None, sources)
    save_state(tmp_path / "state", make_state(7)._replace(sources=sources))
    check_sources(tmp_path, newest_sources(tmp_path), sources)
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert loaded.sources == sources
    with pytest.raises(InputError, match=r"run_dir: .* was trained with other validation images"):
        check_sources(tmp_path, newest_sources(tmp_path), {**sources, "validation images": "c"})


def test_what_somebody_else_has_put_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    save_state(folder, make_state(7))
    (folder / "step_00000009.bak").mkdir()
    (folder / "step_00000001.txt").write_text("x")
    (folder / "step_00000010").write_text("x")
    for step in (8, 9):
        save_state(folder, make_state(step))
    strange = ["step_00000001.txt", "step_00000009.bak", "step_00000010"]
    assert names(folder) == sorted(["step_00000008", "step_00000009", *strange])
    loaded = load_state(folder)
    assert loaded is not None
    assert loaded.step == 9


def test_states_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    for step in (99_999_998, 99_999_999, 100_000_000):
        save_state(folder, make_state(step))
    assert names(folder) == ["step_100000000", "step_99999999"]
    loaded = load_state(folder)
    assert loaded is not None
    assert loaded.step == 100_000_000


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed to the disk, and what is renamed, by name and in order."""
    found: list[tuple[str, str]] = []
    flush, rename, replace = os.fsync, Path.rename, Path.replace

    def name_of(path: str | Path) -> str:
        return re.sub(r"tmp\d+$", "tmp", Path(path).name)

    def recorded_flush(descriptor: int) -> None:
        found.append(("flush", name_of(os.readlink(f"/proc/self/fd/{descriptor}"))))
        flush(descriptor)

    def recorded_rename(own: Path, target: Path) -> Path:
        found.append(("rename", name_of(target)))
        return rename(own, target)

    def recorded_replace(own: Path, target: Path) -> Path:
        found.append(("rename", name_of(target)))
        return replace(own, target)

    monkeypatch.setattr(os, "fsync", recorded_flush)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    return found


def test_a_state_is_on_the_disk_before_it_counts(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    save_state(tmp_path / "state", make_state(7))
    renamed = events.index(("rename", "step_00000007"))
    files = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
    assert set(events[:renamed]) == {("flush", name) for name in [*files, ".step_00000007.tmp"]}
    assert events[renamed + 1 :] == [("flush", "state")]


def test_a_replaced_file_is_on_the_disk_before_it_counts(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    replace_file(tmp_path / "a.json", lambda path: path.write_text("x"))
    folder = ("flush", tmp_path.name)
    assert events == [("flush", ".a.json.tmp"), ("rename", "a.json"), folder]


def test_metrics_are_on_the_disk_before_a_state_relies_on_them(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    with RunLog(tmp_path, Accelerator(), 0) as log:
        events.clear()
        log.write(1, "train", {"loss": 1.0})
        log.flush()
        assert events == [("flush", "metrics.jsonl")]


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        weight.grad = torch.tensor([1.0, -2.0, 3.0]) * number
        optimizer.step()

    weight, optimizer = make()
    step(weight, optimizer, 1)
    saved_weight = weight.detach().clone()
    saved = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer_state(optimizer).items()}
    step(weight, optimizer, 2)
    other, restored = make()
    other.data.copy_(saved_weight)
    restore_optimizer(restored, saved)
    step(other, restored, 2)
    assert torch.equal(other, weight)
