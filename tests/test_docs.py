"""What the documentation says, done: the first hour with a smaller model, and the links."""

import contextlib
import io
import logging
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS

ROOT = Path(__file__).parents[1]
FIRST_HOUR = (ROOT / "docs" / "first-hour.md").read_text()
SMALLER = {
    "shapes32-sqvae2": "tiny",
    "--extend-to 3000": "--extend-to 6",
    "--minutes 5": "--minutes 0.01",
    "--num-images 16": "--num-images 24",
}


def run(command: str, log: io.StringIO) -> str:
    """Standard output and log of `hqvae ...`."""
    verb, *arguments = shlex.split(command.removeprefix("hqvae "))
    name = verb.replace("-", "_")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.delitem(sys.modules, f"pipelines.{name}", raising=False)
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(f"pipelines.{name}", run_name="__main__")
    assert not caught.value.code, (command, log.getvalue())
    return output.getvalue() + log.getvalue()


def pattern(line: str) -> str:
    """A line of the page, in which numbers may be others."""
    return r"[\d,.]+".join(map(re.escape, re.split(r"[\d,.]*\d", line)))


def test_the_first_hour_names_the_steps_of_its_preset() -> None:
    for run in (TOKENIZER_PRESETS["shapes32-sqvae2"], PRIOR_PRESETS["shapes32-sqvae2"]):
        steps = run.training.total_steps
        assert f"step {steps:,} is done" in FIRST_HOUR
    assert TOKENIZER_PRESETS["shapes32-sqvae2"].training.total_steps < 3_000  # then it is extended


@pytest.mark.slow
def test_a_first_hour_goes_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in its order, each line of output, and the Python at the end."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(console|python)\n(.*?)```", FIRST_HOUR, re.DOTALL)
    assert [kind for kind, _ in blocks].count("console") >= 6
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "first-hour.md", "exec"), {})
            continue
        for part in block.split("$ ")[1:]:
            command, *expected = part.splitlines()
            for longer, shorter in SMALLER.items():
                command = command.replace(longer, shorter)
            log = io.StringIO()
            handler = logging.StreamHandler(log)
            logging.getLogger().addHandler(handler)
            monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
            try:
                output = run(command, log)
            finally:
                logging.getLogger().removeHandler(handler)
            for line in expected:
                assert re.search(pattern(line), output), (command, line, output)
    assert Path("reconstructed.png").is_file()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_what_a_page_names_of_the_project_exists(page: Path) -> None:
    """Files in code, and packages of Python lines that are imported."""
    text = page.read_text()
    for name in re.findall(r"`((?:benchmarks|tests|pipelines|prior|tokenizer)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, page.name, "exec")
