"""Laws of the record of a run."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from pipelines.run.log import RunLog, read_metrics
from tokenizer.storage.errors import InputError


class Recorder(Accelerator):
    """Keeps what it is given, in place of a tracker."""

    is_main_process = True

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.has_ended = False
        self.trackers = [self]

    def init_trackers(self, *names: str) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values

    def finish(self) -> None:
        self.has_ended = True


def write(folder: Path, steps: range, first_step: int = 0) -> Recorder:
    recorder = Recorder()
    with RunLog(folder, recorder, first_step) as log:
        for step in steps:
            log.write(step, "train", {"loss": float(step)})
    return recorder


def test_what_is_written_is_read_back_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, Recorder(), 0) as log:
        log.write(1, "train", {"loss": 0.1 + 0.2, "perplexity": [1.5, 2.5]})
        log.write(2, "train", {"loss": 1e-300, "perplexity": [3.0, 4.0]})
        log.write(2, "validation", {"RMSE": 0.25})
        assert read_metrics(tmp_path, "train") == {
            "loss": [[1, 2], [0.1 + 0.2, 1e-300]],
            "perplexity": [[1, 2], [[1.5, 2.5], [3.0, 4.0]]],
        }
        assert read_metrics(tmp_path, "validation") == {"RMSE": [[2], [0.25]]}
        assert read_metrics(tmp_path, "test") == {}


@given(killed_at=st.integers(0, 9), resumed_from=st.integers(0, 9), end=st.integers(0, 12))
def test_a_resumed_run_has_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, killed_at: int, resumed_from: int, end: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    first_step = min(killed_at, resumed_from)
    write(folder, range(1, killed_at + 1))
    write(folder, range(first_step + 1, end + 1), first_step)
    steps, _ = read_metrics(folder, "train").get("loss", [[], []])
    assert steps == list(range(1, max(first_step, end) + 1))


@pytest.mark.parametrize("damage", [b"\xff", b"}", b"\r", b""])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:5] + damage + lines[1][6:]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(
        InputError, match=r"metrics\.jsonl: line 2 is damaged: repair or remove it to go on"
    ):
        write(tmp_path, range(3, 5), 3)


@pytest.mark.parametrize(
    ("damage", "is_noticed"),
    [
        (lambda lines: lines, False),
        (lambda lines: [*lines, b"half of a lin"], False),
        (lambda lines: lines[:1] + lines[2:], True),
        (lambda lines: [lines[0].replace(b"1.0", b"1.5"), *lines[1:]], True),
        (lambda lines: [], True),
    ],
)
def test_lines_that_somebody_took_out_or_changed_are_noticed(
    damage: Callable[[list[bytes]], list[bytes]],
    is_noticed: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with RunLog(tmp_path, Recorder(), 0) as log:
        for step in range(1, 4):
            log.write(step, "train", {"loss": float(step)})
        content_hash = log.flush()
        log.write(4, "train", {"loss": 4.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    with RunLog(tmp_path, Recorder(), 3, content_hash) as log:
        log.write(4, "train", {"loss": 4.0})
    warnings = [record.getMessage() for record in caplog.records]
    message = f"{path}: lines up to step 3 are missing or changed; the weights are not affected"
    assert warnings == [message] * is_noticed


def test_layers_become_curves_of_their_own_in_the_tracker_and_infinity_none(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    values = {"RMSE": 30.0, "PSNR": float("inf"), "perplexity": [1.0, 2.0], "unused": []}
    with contextlib.suppress(ArithmeticError), RunLog(tmp_path, recorder, 0) as log:
        log.write(5, "validation", values)
        raise ArithmeticError
    assert recorder.logged == {
        5: {
            "validation/RMSE": 30.0,
            "validation/perplexity/layer_1_of_2": 1.0,
            "validation/perplexity/layer_2_of_2": 2.0,
        }
    }
    assert recorder.has_ended  # also after an error
    assert read_metrics(tmp_path, "validation")["PSNR"] == [[5], [float("inf")]]


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "is_main_process", False)
    recorder = write(tmp_path, range(1, 4))
    assert not any(tmp_path.iterdir())
    assert recorder.logged == {}
    assert recorder.has_ended
