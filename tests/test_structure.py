"""The shape of the project: who imports whom, and that the README tells the truth."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import pipelines
from pipelines.decoder_run import parse_decoder_run
from pipelines.options import parse_options, parse_run
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.folder import save_run
from pipelines.verbs import VERBS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGES = ("tokenizer", "prior", "pipelines")
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def output_of(program: str) -> list[str]:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return ended.stdout.split()


def modules_of(package: str) -> list[Path]:
    """Paths of the modules below the root of the project."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    return [path for path in paths if path.name != "__init__.py"]


def test_the_import_contracts_hold() -> None:
    # In a process of its own: it disables the loggers of this one.
    output_of("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())")


def test_importing_the_pipeline_loads_what_it_needs_alone() -> None:
    loaded = output_of(
        "import sys; from pipelines import ImageGenerationPipeline as _; print(*sys.modules)"
    )
    assert "pipelines.generation" in loaded
    assert not {"accelerate", "matplotlib", "tyro"} & set(loaded)
    assert not [name for name in loaded if name.startswith(("pipelines.run", "pipelines.training"))]
    # What is done with the content of a file, and nothing of where files come from.
    of_data = {name.split(".")[-1] for name in loaded if name.startswith("pipelines.data.")}
    assert of_data == {
        *("color_profiles", "conversion", "decoding", "formats", "limits", "sixteen_bits"),
    }


def test_importing_a_module_changes_neither_hooks_nor_warning_filters() -> None:
    names = [
        ".".join(path.with_suffix("").parts)
        for package in PACKAGES
        for path in modules_of(package)
        if "triton" not in path.name  # needs a GPU
        and "page" not in path.parts  # needs Gradio
    ]
    # The libraries change filters; what is left is ours.
    libraries = ["accelerate", "scipy.special", "timm", "torch_fidelity"]
    program = f"""
import importlib, sys, threading, warnings
for library in {libraries}:
    importlib.import_module(library)
before = sys.excepthook, threading.excepthook, list(warnings.filters)
for name in {names}:
    importlib.import_module(name)
    assert (sys.excepthook, threading.excepthook, list(warnings.filters)) == before, name
    assert "transformers" not in sys.modules, name
"""
    assert output_of(program) == []


def test_what_is_installed_is_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = [path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(settings["packages"]) == found


TREE = (ROOT / "docs" / "tree.md").read_text()
FOLDERS = (*PACKAGES, "tests", "benchmarks", "docs")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_or_its_room_stands_in_the_tree(package: str) -> None:
    for path in modules_of(package):
        rooms = [f" {room}/" for room in path.parts[1:-1]]
        assert path.name in TREE or any(room in TREE for room in rooms), path


def test_what_stands_in_the_trees_exists() -> None:
    there = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    of_readme = README.read_text().partition("## The tree")[2].partition("\n```\n\n")[0]
    for text in (TREE, of_readme):
        assert set(re.findall(r"\w+(?:\.py|(?=/))", text.partition("A run folder")[0])) <= {
            *there,
            *FOLDERS,
        }


def commands() -> Iterator[list[str]]:
    """What README and docs give to `python -m pipelines.` or `hqvae`, in blocks and inline."""
    text = "\n".join(page.read_text() for page in PAGES)
    for match in re.finditer(r"(?:python -m pipelines\.|(?<![-\w])hqvae )([a-z][^`\n]*)", text):
        yield shlex.split(match.group(1), comments=True)


def test_the_readme_shows_the_commands() -> None:
    shown = {words[0].replace("_", "-") for words in commands()}
    assert shown == {*VERBS} - {"demo"}


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_of_the_readme_is_understood(words: list[str], tmp_path: Path) -> None:
    verb, *arguments = words
    takes = VERBS[verb.replace("_", "-")].takes
    name = f"pipelines.{verb.replace('-', '_')}"
    if not arguments or "--help" in arguments:
        return
    if isinstance(takes, Mapping):
        parse_run(takes, name, arguments)
    elif isinstance(takes, type):
        parse_options(takes, name, arguments)
    else:
        (tmp_path / "tokenizer").mkdir()
        save_run(TOKENIZER_PRESETS["tiny"], tmp_path / "tokenizer" / "config.json")
        parse_decoder_run(name, [str(tmp_path), *arguments[1:]])


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
