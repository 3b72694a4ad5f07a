"""Numbers that a change of structure must not move: losses, weights, codes, images.

`golden/runs.json` was written by commit 19c0523. A change of these numbers changes what people
get: it needs an entry in the change log.
"""

import json
from pathlib import Path

import pytest

from tests.golden.runs import assert_same_metrics, golden_runs, machine, measure

GOLDEN = json.loads((Path(__file__).parent / "golden" / "runs.json").read_text())
CONFIGS = golden_runs()


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_a_run_gives_the_golden_numbers(name: str, tmp_path: Path) -> None:
    golden, found = GOLDEN["runs"][name], measure(tmp_path, *CONFIGS[name])
    for stage, lines in golden["metrics"].items():
        assert_same_metrics(found["metrics"][stage], lines)
    if machine() == GOLDEN["machine"]:
        assert {**found, "metrics": None} == {**golden, "metrics": None}
