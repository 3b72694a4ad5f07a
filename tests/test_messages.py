"""Error messages: each has a test that provokes it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenizer", "prior", "pipelines")
FRAGMENT = 14
"""Characters of a message that a test must repeat; fewer would match by chance."""


def fragments(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and constant parts of each message that a module raises for a user."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        if getattr(node.exc.func, "id", "") not in ("InputError", "ValueError"):
            continue
        constants = [own for own in ast.walk(node.exc.args[0]) if isinstance(own, ast.Constant)]
        parts = [own.value.strip() for own in constants if isinstance(own.value, str)]
        longest = max(parts, key=len, default="")
        # Without constant parts it is the message of another layer.
        if longest:
            long_parts = [part for part in parts if len(part) >= FRAGMENT] or [longest]
            yield f"{path.relative_to(ROOT)}:{node.lineno}", long_parts


MESSAGES = dict(
    entry
    for name in PACKAGES
    for path in sorted((ROOT / name).glob("*.py"))
    for entry in fragments(path)
)


@pytest.fixture(scope="module")
def expectations() -> str:
    """All that the tests expect, without the marks of regular expressions."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    joined = re.sub(r'"\s*\n\s*r?f?"', "", text)
    return joined.replace("\\", "").replace(".*", " ")


@pytest.mark.parametrize("place", MESSAGES)
def test_every_message_is_expected_by_a_test(place: str, expectations: str) -> None:
    assert any(
        part[start : start + FRAGMENT] in expectations
        for part in MESSAGES[place]
        for start in range(max(1, len(part) - FRAGMENT + 1))
    ), MESSAGES[place]
