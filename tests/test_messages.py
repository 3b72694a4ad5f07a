"""Error messages: each has a test that provokes it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAGMENT = 14
"""Characters of a message that a test must repeat; less would match by chance."""


def messages() -> Iterator[tuple[str, list[str]]]:
    """Place and constant parts of each message that is raised for a user."""
    for path in sorted(path for name in PACKAGES for path in (ROOT / name).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                if name in ("InputError", "ValueError") and node.exc.args:
                    texts = [
                        own for own in ast.walk(node.exc.args[0]) if isinstance(own, ast.Constant)
                    ]
                    parts = [own.value for own in texts if isinstance(own.value, str)]
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", parts


PACKAGES = ("tokenizer", "prior", "pipelines")
MESSAGES = dict(messages())


@pytest.fixture(scope="module")
def tests() -> str:
    """All that the tests expect, without the marks of regular expressions."""
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    joined = re.sub(r'"\s*\n\s*r?f?"', "", "\n".join(texts))
    return joined.replace("\\", "").replace(".*", " ")


@pytest.mark.parametrize("place", MESSAGES)
def test_every_message_is_provoked_by_a_test(place: str, tests: str) -> None:
    parts = [part.strip() for part in MESSAGES[place]]
    long_parts = [part for part in parts if len(part) >= FRAGMENT] or [
        max(parts, key=len, default="")
    ]
    if not any(long_parts):
        return  # a message that another layer wrote
    assert any(
        part[start : start + FRAGMENT] in tests
        for part in long_parts
        for start in range(max(1, len(part) - FRAGMENT + 1))
    ), long_parts
