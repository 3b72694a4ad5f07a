"""The console command `hqvae`, and what every command does while it starts."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines import console
from pipelines.page_configs import AppConfig
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.verbs import VERBS, check_inputs
from tokenizer.storage.errors import InputError

ROOT = Path(__file__).parents[2]
CALLS = [
    ["-m", "pipelines.train_tokenizer"],
    ["-c", "from pipelines.console import main; main()", "train-tokenizer"],
]

NO_RUN = "run_dir must hold a trained tokenizer: there is no "


def start(*arguments: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def hqvae(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of the console command."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hqvae", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        console.main()
    return int(caught.value.code or 0)


def test_every_command_is_a_verb() -> None:
    texts = {path.stem: path.read_text() for path in (ROOT / "pipelines").glob("*.py")}
    names = {name for name, text in texts.items() if 'if __name__ == "__main__":' in text}
    assert {verb.replace("-", "_") for verb in VERBS} == names


EVERY_VERB = """
import contextlib, io, json, sys
from pipelines.console import main
seen = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["hqvae", *arguments]
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
    seen.append([status, output.getvalue(), errors.getvalue()])
print(json.dumps([sorted({"torch", "numpy", "PIL"} & {*sys.modules}), seen]))
"""


def test_the_verbs_are_listed_without_heavy_imports(tmp_path: Path) -> None:
    words: list[list[str]] = [["--help"], []]
    for verb, entry in VERBS.items():
        preset = ["tiny"] if isinstance(entry.takes, Mapping) else []
        words += [[verb, *preset, "--help"], [verb, *preset, "--nonsense"]]
    process = start("-c", EVERY_VERB, json.dumps(words), folder=tmp_path)
    heavy, seen = json.loads(process.communicate()[0])
    assert (process.returncode, heavy) == (0, [])
    for arguments, (status, output, errors) in zip(words, seen, strict=True):
        if len(arguments) < 2:
            assert (status, errors) == (2 if not arguments else 0, "")
            assert re.findall(r"^  ([\w-]+) ", output, re.MULTILINE) == [*VERBS]
        else:
            assert (status, bool(errors)) == (2 * (arguments[-1] != "--help"), not output)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_the_module_and_named_as_it_was_called(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hqvae(monkeypatch, verb, "--help") == 0
    from_console = capsys.readouterr().out
    assert from_console.startswith(f"usage: hqvae {verb} ")
    module = importlib.import_module(f"pipelines.{verb.replace('-', '_')}")
    monkeypatch.setattr(sys, "argv", ["/some/where.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    from_module = capsys.readouterr().out
    assert " ".join(from_module.split()) == " ".join(
        from_console.replace(f"hqvae {verb}", f"python -m {module.__name__}").split()
    )


def test_what_a_command_may_fetch_need_not_be_there(tmp_path: Path) -> None:
    cifar10 = TOKENIZER_PRESETS["cifar10-sqvae"]
    assert cifar10.data.root is not None
    check_inputs(cifar10)
    check_inputs(TOKENIZER_PRESETS["tiny"])
    check_inputs(AppConfig(run_dir="user/model"))
    for name in ("user/model/prior", str(tmp_path / "none")):
        with pytest.raises(InputError, match=r"^run_dir: .* does not exist$"):
            check_inputs(AppConfig(run_dir=name))


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hqvae(monkeypatch, "--version") == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"hqvae {project['version']}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generat"], "unknown verb 'generat': did you mean 'generate'?"),
        (["check_data"], "unknown verb 'check_data': did you mean 'check-data'?"),
        (["xyz", "--help"], f"unknown verb 'xyz': give one of {', '.join(VERBS)}"),
        (["generate", "none", "--output-dir", "out"], f"{NO_RUN}none/tokenizer/config.json\n"),
        (["evaluate", "none"], NO_RUN),
        (["evaluate", "--folders", "none", "x", "--image-size", "8"], "folders: none does not"),
        (["reconstruct", "none", "x.png", "--output-dir", "out"], NO_RUN),
        (["summary", "none"], NO_RUN),
        (["explain", "none"], NO_RUN),
        (["train-prior", "tiny", "--run-dir", "none"], NO_RUN),
        (["finetune-decoder"], "Missing from hqvae finetune-decoder: RUN, the folder of a run"),
        (["train-tokenizer", "images32-small", "--data.root", "none"], "data.root: "),
        (["train-tokenizer", "images32-small"], "data.root must name a folder of images where"),
        (["train-tokenizer", "images32-small", "--data.root", "empty"], "data.root: "),
        (["quickstart", "empty"], "folder: empty holds no PNG"),
        (["train-tokenizer", "tiny", "--extend-to", "5"], "extend_to must be None: "),
        (["train-tokenizer", "tiny", "--initialize-from", "none"], "initialize_from: "),
        (["app", "none"], "run_dir: none does not exist\n"),
        (["check-data", "none"], "folder: none does not exist\n"),
        (["quickstart", "none"], "folder: none does not exist\n"),
    ],
)
def test_what_is_wrong_or_not_there_gives_one_line_before_a_command_is_imported(
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "importlib", None)
    assert hqvae(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"error: {line}")
    assert output.err.count("\n") == 1


def test_labels_and_extensions_are_compared_with_the_run_before_a_command_is_imported(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "importlib", None)
    for arguments, line in (
        (["generate", str(tiny_run), "--output-dir", "out", "--labels", "x"], "labels: no class"),
        (["train-prior", "tiny", "--run-dir", str(tiny_run), "--extend-to", "4"], "extend_to must"),
    ):
        assert hqvae(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize("command", CALLS)
def test_a_new_process_writes_that_line_alone(command: list[str], tmp_path: Path) -> None:
    process = start(*command, "tiny", "--training.sead", "3", folder=tmp_path)
    output = process.communicate(timeout=120)
    assert output == (
        "",
        "error: Unrecognized options: --training.sead, 3; did you mean '--training.seed'?\n",
    )
    assert process.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command", CALLS)
def test_being_stopped_while_libraries_are_imported_gives_no_traceback(
    command: list[str], tmp_path: Path
) -> None:
    process = start(*command, "tiny", folder=tmp_path)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)
    assert output == ("", "stopped\n")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_read_enough_gets_no_traceback(tmp_path: Path) -> None:
    program = "from pipelines.console import main; main()"
    process = start("-c", program, "--help", folder=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, "")
