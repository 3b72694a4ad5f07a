"""Generated sections of docs/results.md and other pages, between marks such as `<!-- NAME -->`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
RESULTS = README.parent / "docs" / "results.md"


def replace_section(name: str, text: str, page: Path | None = None) -> None:
    """Puts `text` between the marks of a section of docs/results.md, or of another page."""
    page = page or RESULTS
    before, opening, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    assert opening, f"{page.name} has no section {name}"
    assert closing, f"{page.name}'s section {name} has no end"
    page.write_text(f"{before}{opening}{text}\n{closing}{after}")


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Header, rule and rows."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
