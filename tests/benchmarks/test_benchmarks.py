"""Results and the pages that are made from them."""

import json
from pathlib import Path

import pytest

from benchmarks import cifar10, readme
from tests.faults import __main__ as faults


def test_the_page_of_results_shows_the_table_of_the_committed_results() -> None:
    text = readme.RESULTS.read_text()
    section = text.partition("<!-- cifar10 -->\n")[2].partition("\n<!-- /cifar10 -->")[0]
    assert section == cifar10.table()


def test_a_section_is_replaced_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    monkeypatch.setattr(readme, "RESULTS", path)
    readme.replace_section("x", "new")
    assert path.read_text() == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"


def test_the_page_on_reliability_shows_the_committed_counts() -> None:
    text = readme.README.with_name("RELIABILITY.md").read_text()
    section = text.partition("<!-- faults -->\n")[2].partition("\n<!-- /faults -->")[0]
    assert section == faults.table(json.loads(faults.RESULTS.read_text()))
