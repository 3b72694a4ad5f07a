"""Generated sections of README.md, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def replace_section(name: str, text: str) -> None:
    """Puts `text` between the marks of a section."""
    before, opening, rest = README.read_text().partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    assert opening, f"README.md has no section {name}"
    assert closing, f"README.md's section {name} has no end"
    README.write_text(f"{before}{opening}{text}\n{closing}{after}")
