"""A page as its text, labels, attributes and images."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Text, attributes and images of a page; every element has to be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text: list[str] = []
        self.labels: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in {"meta", "img"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1] == "bdi":
            self.labels.append(data)

    def holds(self, text: str) -> bool:
        return text in "|".join(self.text)
