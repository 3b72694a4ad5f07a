"""Command lines: what they accept, and the one line for what they do not."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.distributed import DistBackendError

from pipelines.command import parse_options, parse_run, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.generate import GenerateConfig
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.run.folder import load_run
from pipelines.training.divergence import DivergenceError
from tokenizer.quantizers import NearestQuantizerConfig
from tokenizer.storage.errors import InputError


def parse(*arguments: str) -> TokenizerRunConfig:
    return parse_run(TOKENIZER_PRESETS, "pipelines.train_tokenizer", arguments)


def parse_generate(*arguments: str) -> GenerateConfig:
    return parse_options(GenerateConfig, "pipelines.generate", ["run", *arguments])


# What is accepted


@pytest.mark.parametrize("name", TOKENIZER_PRESETS)
def test_a_preset_by_name_is_that_preset(name: str) -> None:
    assert parse(name) == TOKENIZER_PRESETS[name]
    assert parse_run(PRIOR_PRESETS, "pipelines.train_prior", [name]) == PRIOR_PRESETS[name]


def test_options_change_their_field_alone() -> None:
    config = parse(
        *("tiny", "--run-dir", "here", "--training.total-steps", "7", "--data.horizontal-flip"),
        *("--tokenizer.networks.width", "16"),
    )
    assert config.run_dir == Path("here")
    assert config.training.total_steps == 7
    assert config.data.horizontal_flip is True
    assert config.tokenizer.networks.width == 16
    tiny = TOKENIZER_PRESETS["tiny"]
    assert config.training.model_copy(update={"total_steps": 4}) == tiny.training
    assert config.tokenizer.groups == tiny.tokenizer.groups


def test_options_reach_the_quantizer_that_the_preset_has() -> None:
    quantizer = parse("tiny-baseline", "--tokenizer.quantizer.decay", "0.5").tokenizer.quantizer
    assert quantizer == NearestQuantizerConfig(decay=0.5)


def test_a_saved_config_stands_for_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    saved = parse("tiny", "--training.seed", "3", "--run-dir", "here")
    path.write_text(saved.model_dump_json())
    assert parse(str(path)) == saved
    assert parse(str(path), "--training.seed", "0", "--run-dir", "runs/tiny") == parse("tiny")
    assert load_run(TokenizerRunConfig, path) == saved


def test_sampling_options_are_one_number_or_one_per_layer() -> None:
    config = parse_generate("--output-dir", "out", "--labels", "1", "2")
    assert config.labels == (1, 2)
    assert config.sampling.temperature == 1.0
    config = parse_generate("--output-dir", "out", "--sampling.temperature", "1", "0.5")
    assert config.sampling.temperature == (1.0, 0.5)


# Help


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert not caught.value.code
    output = capsys.readouterr().out
    assert all(name in output for name in TOKENIZER_PRESETS)


def test_without_a_preset_the_usage_is_shown_as_an_error() -> None:
    with pytest.raises(SystemExit) as caught:
        parse()
    assert caught.value.code == 2


def test_help_after_a_preset_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("tiny", "--help")
    assert not caught.value.code
    output = capsys.readouterr().out
    for field in TOKENIZER_PRESETS["tiny"].training.model_dump():
        assert f"--training.{field.replace('_', '-')}" in output
    assert "Peak learning rate." in " ".join(output.split())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "unknown preset 'tinny': give one of shapes32-sqvae2"),
        (["none.json"], "none.json: no such file"),
        (["tiny", "--training.nope", "3"], "Unrecognized options: --training.nope"),
        (["tiny", "stray"], "Unrecognized options: stray"),
        (["tiny", "--training.total-steps", "many"], "--training.total-steps.*'many'"),
        (["tiny", "--training.total-steps"], "--training.total-steps"),
        (["tiny", "--training.total-steps", "0"], "total_steps: .*greater than 0, got 0"),
        (["tiny", "--training.precision", "fp8"], "fp8.*precision"),
        (["tiny", "--data.dataset", "nope"], "nope.*dataset"),
        (["tiny", "--tokenizer.channels", "5"], "channels: .*less than or equal to 4, got 5"),
        (["tiny", "--tokenizer.networks.patch-size", "3"], "patch_size must be a power of two"),
        (
            ["tiny", "--tokenizer.groups.1.downsampling", "3"],
            r"^tokenizer\.groups\.1\.downsampling must be a power of two, got 3$",
        ),
        (
            ["tiny", "--tokenizer.groups.0.code-dim", "0"],
            r"^tokenizer\.groups\.0\.code_dim: .* greater than 0, got 0$",
        ),
        (
            [
                *("tiny", "--tokenizer.groups.0.code-dim=8", "--tokenizer.groups.1.code-dim=0"),
                *("--tokenizer.groups.0.downsampling", "8"),
            ],
            r"^tokenizer\.groups\.1\.code_dim: .* greater than 0, got 0$",
        ),
        (
            [
                *("tiny", "--tokenizer.groups.0.downsampling", "8"),
                *("--tokenizer.groups.1.downsampling", "3"),
            ],
            r"^tokenizer\.groups\.1\.downsampling must be a power of two, got 3$",
        ),
        (
            ["tiny", "--training.variance-band", "3", "1"],
            r"^training\.variance_band must go from low to high, got \(3\.0, 1\.0\)$",
        ),
        (["tiny", "--run-dir", ""], "^run_dir: must name a folder of its own, got '' or '.'$"),
        (["tiny", "--run-dir", "."], "^run_dir: must name a folder of its own"),
    ],
)
def test_a_wrong_command_line_gives_one_line_that_names_the_field(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    output = capsys.readouterr()
    assert output.out == output.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output-dir"),
        (["--output-dir", "o", "--num-images", "0"], "num_images: .*greater than 0, got 0"),
        (["--output-dir", "o", "--labels", "-1"], r"labels\.0: .*greater than or equal to 0"),
        (
            ["--output-dir", "o", "--sampling.temperature", "-1"],
            r"^sampling\.temperature.*or equal to 0.000001",
        ),
        (["--output-dir", ""], "^output_dir: must name a folder of its own"),
        (
            ["--output-dir", "o", "--sampling.top-p", "1.5"],
            r"^sampling\.top_p.*less than or equal to 1",
        ),
    ],
)
def test_a_wrong_option_of_generate_gives_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_generate(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "Input should be an object"),
        (b'{"run_dir": "x"}', "tokenizer: Field required"),
        (b'{"run_dir": "x", "run_dir": "y"}', "a key stands twice"),
        (b'{"run_dir": "x\\u0000y"}', "run_dir: must not hold a NUL character"),
    ],
)
def test_a_config_file_that_does_not_fit_is_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*{message}"):
        parse(str(path))


def test_unknown_keys_and_wrong_types_in_a_config_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = TOKENIZER_PRESETS["tiny"].model_dump_json()
    path.write_text(text.replace('"seed":0', '"seed":"0","sead":1'))
    with pytest.raises(InputError, match=r"training\.seed: .*valid integer, got '0'") as caught:
        parse(str(path))
    assert "training.sead: Extra inputs are not permitted, got 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_config_of_the_other_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(PRIOR_PRESETS["tiny"].model_dump_json())
    with pytest.raises(InputError, match=r"tokenizer: Field required.*prior: Extra inputs"):
        parse(str(path))


# From an error to an exit status


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def invalid() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        EvaluateConfig(run_dir="a", num_images=0)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("field must be x,\n got y"), "error: field must be x, got y"),
        (DivergenceError("step 3: loss is nan"), "error: step 3: loss is nan"),
        (
            OSError(28, "No space left on device", "a/b"),
            "error: a/b: No space left on device; make room there and run the same command again",
        ),
        (OSError(13, "Permission denied", "a/b"), "error: a/b: Permission denied\n"),
        (OSError(21, "Is a directory", "a/.b.tmp", None, "a/b"), "error: a/b: Is a directory\n"),
        (OSError("no number"), "error: no number\n"),
        (invalid(), "error: num_images: "),
    ],
)
def test_an_expected_error_is_one_line_and_status_2(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error))
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(line)
    assert output.count("\n") == 1


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)\nException raised"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), ""),
        (MemoryError("decoding a.png"), " (decoding a.png)"),
        (RuntimeError(ALLOCATOR), " (tried to allocate 4096 bytes)"),
        (RuntimeError("could not create a primitive"), " (could not create a primitive)"),
        (RuntimeError("std::bad_alloc"), " (std::bad_alloc)"),
        (RuntimeError("can't start new thread"), " (can't start new thread)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), " (CUDA error: "),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            " (tried to allocate 2.50 GiB)",
        ),
        (OSError(12, "Cannot allocate memory"), " ([Errno 12] Cannot allocate memory)"),
    ],
)
def test_a_lack_of_memory_of_any_kind_is_one_line_that_says_what_to_change(
    error: Exception, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error), "lower the batch size")
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: out of memory{reason}")
    assert output.endswith(": lower the batch size\n")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyError("bug"), AssertionError(), ValueError("bug")]
)
def test_a_bug_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_a_full_disk_that_a_thread_notices_adds_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        errors: list[OSError] = []

        def write() -> None:
            errors.append(OSError(28, "No space left on device"))
            raise errors[0]

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        raise errors[0]

    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err.startswith("error: No space left on device; make room there")


def test_sigterm_stops_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped; run the same command again\n"
    assert signal.getsignal(signal.SIGTERM) is previous


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"
        ),
        DistBackendError("NCCL error"),
    ],
)
def test_the_death_of_another_process_is_one_line(
    error: RuntimeError, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")


def test_being_stopped_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(KeyboardInterrupt("stopped and saved at step 3")))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped and saved at step 3\n"


def test_success_is_status_0() -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: None)
    assert caught.value.code == 0
