"""The shape of the project: who imports whom, and that the README tells the truth."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines
from pipelines.command import parse_options, parse_run
from pipelines.demo import DemoConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.generate import GenerateConfig
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.reconstruct import ReconstructConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OPTIONS = {
    "pipelines.demo": DemoConfig,
    "pipelines.evaluate": EvaluateConfig,
    "pipelines.generate": GenerateConfig,
    "pipelines.reconstruct": ReconstructConfig,
}
PRESETS = {
    "pipelines.train_tokenizer": TOKENIZER_PRESETS,
    "pipelines.train_prior": PRIOR_PRESETS,
}


def test_the_import_contracts_hold() -> None:
    # In a process of its own: it disables the loggers of this one.
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("package", ["tokenizer", "prior", "pipelines"])
def test_every_module_stands_in_the_tree_of_the_readme(package: str) -> None:
    tree = README.read_text()
    names = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert {name for name in names if name not in tree} == set()


def commands() -> Iterator[list[str]]:
    """What the README gives to `python -m`, in blocks and inline."""
    for match in re.finditer(r"python -m (pipelines\.[^`\n]*)", README.read_text()):
        yield shlex.split(match.group(1), comments=True)


def test_the_readme_shows_the_commands() -> None:
    assert {words[0] for words in commands()} >= {
        "pipelines.train_tokenizer",
        "pipelines.train_prior",
        "pipelines.generate",
        "pipelines.evaluate",
    }


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_of_the_readme_is_understood(words: list[str]) -> None:
    module, *arguments = words
    if module in PRESETS:
        parse_run(PRESETS[module], module, arguments)
    else:
        parse_options(OPTIONS[module], module, arguments)


def test_the_python_of_the_readme_compiles_and_finds_its_names() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in re.findall(r"from pipelines import (\w+)", block):
            assert hasattr(pipelines, name)


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([\w-]+)", README.read_text(), re.MULTILINE)) <= targets
