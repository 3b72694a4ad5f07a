"""Command lines: what they accept, and the one line for what they do not."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.distributed import DistBackendError

from pipelines.command import run_command
from pipelines.command_configs import EvaluateConfig, GenerateConfig
from pipelines.config import TokenizerRunConfig
from pipelines.options import parse_options, parse_run
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.run.folder import load_run
from pipelines.training.divergence import DivergenceError
from tokenizer.config import NearestQuantizerConfig
from tokenizer.storage.configs import StrictConfig, describe_validation_error
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
    quantizer = parse("tiny-baseline", "--tokenizer.quantizer.decay", "0.5").tokenizer.quantizer
    assert quantizer == NearestQuantizerConfig(decay=0.5)


def test_a_saved_config_stands_for_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    saved = parse("tiny", "--training.seed", "3", "--run-dir", "here")
    path.write_text(saved.model_dump_json())
    assert load_run(TokenizerRunConfig, path) == parse(str(path))
    anew = parse(str(path), "--training.seed", "0", "--run-dir", "runs/tiny")
    for found, expected in ((parse(str(path)), saved), (anew, parse("tiny"))):
        assert found.model_dump(mode="json") == expected.model_dump(mode="json")


def test_sampling_options_are_one_number_or_one_per_layer() -> None:
    config = parse_generate("--output-dir", "out", "--labels", "1", "2")
    assert config.labels == ("1", "2")
    assert config.sampling.temperature is None
    config = parse_generate("--output-dir", "out", "--sampling.temperature", "1", "0.5")
    assert config.sampling.temperature == (1.0, 0.5)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2)])
def test_without_a_preset_these_are_listed(
    arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert (caught.value.code or 0) == status
    output = capsys.readouterr().out
    assert all(name in output for name in TOKENIZER_PRESETS)


def test_help_after_a_preset_explains_what_matters_or_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outputs = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as caught:
            parse("tiny", option)
        assert not caught.value.code
        outputs.append(capsys.readouterr().out)
    short, output = outputs
    shown = re.findall(r"^  --(\S+)", short, re.MULTILINE)
    assert [name.replace("-", "_") for name in shown] == [*TokenizerRunConfig.main_options]
    assert "Optimizer steps. (4)" in short
    for field in TOKENIZER_PRESETS["tiny"].training.model_dump(exclude={"extended_at"}):
        assert f"--training.{field.replace('_', '-')}" in output
    assert "Peak learning rate." in " ".join(output.split())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tinny", "unknown preset 'tinny': did you mean 'tiny'?"),
        ("zzz", "unknown preset 'zzz': give one of shapes32-sqvae2"),
        ("none.json", "none.json: no such file"),
        ("tiny --training.nope 3", "Unrecognized options: --training.nope"),
        ("tiny stray", "Unrecognized options: stray"),
        (
            "tiny --training.total-steps many",
            r"^training\.total_steps must be a whole number, got 'many'$",
        ),
        ("tiny --extend-to x", "^extend_to must be a whole number or None, got 'x'$"),
        ("tiny --training.learning-rate=x", r"^training\.learning_rate must be a number, got 'x'$"),
        ("tiny --recipe.variance-band 1 x", "variance_band must be 2 numbers, got '1 x'$"),
        ("tiny --tokenizer.groups.0.codebook-sizes 8 y", "codebook_sizes must be whole numbers, "),
        ("tiny --training.total-steps", "--training.total-steps"),
        ("tiny --training.total-steps 0", "total_steps: .*greater than 0, got 0"),
        ("tiny --training.precision fp8", r"^training\.precision must be one of .*, got 'fp8'$"),
        ("tiny --tokenizer.networks.patch-size 3", "patch_size must be a power of two"),
        (
            "tiny --tokenizer.groups.0.code-dim 0",
            r"^tokenizer\.groups\.0\.code_dim: .* greater than 0, got 0$",
        ),
        (
            "tiny --tokenizer.groups.0.code-dim=8 --tokenizer.groups.1.code-dim=0 "
            "--tokenizer.groups.0.downsampling 8",
            r"^tokenizer\.groups\.1\.code_dim: .* greater than 0, got 0$",
        ),
        (
            "tiny --tokenizer.groups.0.downsampling 8 --tokenizer.groups.1.downsampling 3",
            r"^tokenizer\.groups\.1\.downsampling must be a power of two, got 3$",
        ),
        (
            "tiny --recipe.variance-band 3 1",
            r"^recipe\.variance_band must go from low to high, got \(3\.0, 1\.0\)$",
        ),
        ("tiny --run-dir .", "^run_dir: must be a path, got '' or '.'"),
        ("tiny --run-dir=", "^run_dir: must be a path"),
    ],
)
def test_a_wrong_command_line_gives_one_line_that_names_the_field(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(*arguments.split())
    assert "\n" not in str(caught.value)
    output = capsys.readouterr()
    assert output.out == output.err == ""


def test_a_choice_called_none_is_not_listed_twice() -> None:
    message = r"^condition\.kind must be one of class, none, vectors, text, attributes, got 'x'$"
    with pytest.raises(InputError, match=message):
        parse_run(PRIOR_PRESETS, "pipelines.train_prior", ["tiny", "--condition.kind", "x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--output-dir"),
        ("--output-dir=", "^output_dir: must be a path"),
        ("--output-dir o --num-images 0", "^num_images: .*greater than 0, got 0"),
        ("--output-dir o --sampling.temperature -1", r"^sampling\.temperature.*equal to 0.000001"),
        (
            "--output-dir o --sampling.top-k 3 x",
            r"^sampling\.top_k must be a whole number or several or None, got '3 x'$",
        ),
        ("--output-dir o --sampling.top-p 1.5", r"^sampling\.top_p.*less than or equal to 1"),
    ],
)
def test_a_wrong_option_of_generate_gives_one_line(arguments: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_generate(*arguments.split())
    assert "\n" not in str(caught.value)


TINY = TOKENIZER_PRESETS["tiny"].model_dump_json()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{", "is not JSON"),
        (b"[]", "Input should be an object"),
        (b'{"run_dir": "x"}', "tokenizer: Field required"),
        (b'{"run_dir": "x", "run_dir": "y"}', "a key stands twice"),
        (b'{"run_dir": "x\\u0000y"}', "run_dir: must not hold a NUL character"),
        (
            TINY.replace('"seed":0', '"seed":"0","sead":1').encode(),
            r"training\.sead: Extra inputs are not permitted, got 1.*training\.seed: .*got '0'",
        ),
        (
            PRIOR_PRESETS["tiny"].model_dump_json().encode(),
            "tokenizer: Field required.*prior: Extra inputs",
        ),
    ],
)
def test_a_config_file_that_does_not_fit_is_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.*{message}") as caught:
        parse(str(path))
    assert "\n" not in str(caught.value)


# From an error to an exit status


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def invalid() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        EvaluateConfig(run_dir="a", num_images=0)  # type: ignore[arg-type]
    return caught.value


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)\nException raised"
)
CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("field must be x,\n got y"), "field must be x, got y\n"),
        (DivergenceError("step 3: loss is nan"), "step 3: loss is nan\n"),
        (
            OSError(28, "No space left on device", "a/b"),
            "a/b: No space left on device; make room there and run the same command again\n",
        ),
        (OSError(13, "Permission denied", "a/b"), "a/b: Permission denied\n"),
        (OSError(21, "Is a directory", "a/.b.tmp", None, "a/b"), "a/b: Is a directory\n"),
        (OSError("no number"), "no number\n"),
        (invalid(), "num_images: "),
        (RuntimeError(GLOO), "another process of this run has ended"),
        (DistBackendError("NCCL error"), "another process of this run has ended"),
        (MemoryError(), "out of memory: less\n"),
        (MemoryError("decoding a.png"), "out of memory (decoding a.png): less\n"),
        (RuntimeError(ALLOCATOR), "out of memory (tried to allocate 4096 bytes): less\n"),
        (
            RuntimeError("could not create a primitive"),
            "out of memory (could not create a primitive): less\n",
        ),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc): less\n"),
        (RuntimeError("can't start new thread"), "out of memory (can't start new thread): less\n"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "out of memory (CUBLAS_STATUS_ALLOC_FAILED)"),
        (torch.OutOfMemoryError(CUDA), "out of memory (tried to allocate 2.50 GiB): less\n"),
        (OSError(12, "Cannot allocate memory"), "out of memory ([Errno 12] Cannot allocate memory"),
    ],
)
def test_an_expected_error_is_one_line_and_status_2(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error), "less")
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith(f"error: {line}")
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


@pytest.mark.parametrize(
    ("main", "status", "line"),
    [
        (lambda: None, 0, ""),
        (
            lambda: os.kill(os.getpid(), signal.SIGTERM),
            130,
            "stopped; run the same command again\n",
        ),
        (raising(KeyboardInterrupt("stopped and saved at step 3")), 130, "stopped and saved at"),
    ],
)
def test_sigterm_stops_a_command_as_ctrl_c_does(
    main: Callable[[], None], status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith(line)
    assert signal.getsignal(signal.SIGTERM) is previous


def configs_with_paths(base: type[StrictConfig] = StrictConfig) -> Iterator[tuple[Any, str]]:
    """The fields that hold paths, of all configs."""
    for config_class in base.__subclasses__():
        for name, field in config_class.model_fields.items():
            if "Path" in str(field.annotation):
                yield config_class, name
        yield from configs_with_paths(config_class)


@pytest.mark.parametrize(("config_class", "name"), list(configs_with_paths()))
def test_an_empty_path_is_not_the_present_folder(config_class: Any, name: str) -> None:
    is_pair = "tuple" in str(config_class.model_fields[name].annotation)
    empty = (Path("a"), Path("")) if is_pair else Path("")
    with pytest.raises(ValidationError) as caught:
        config_class.model_validate({name: empty})
    assert f"{name}: must be a path, got '' or '.'" in describe_validation_error(caught.value)
