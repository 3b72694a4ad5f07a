"""Numbers that a change of structure must not move: losses, weights, codes, images.

`golden/runs.json` was written by commit 19c0523. A change of these numbers changes what people
get: it needs an entry in the change log.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.runs import golden_runs, machine, measure

GOLDEN = json.loads((Path(__file__).parent / "golden" / "runs.json").read_text())
CONFIGS = golden_runs()


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_a_run_gives_the_golden_numbers(name: str, tmp_path: Path) -> None:
    golden, found = GOLDEN["runs"][name], measure(tmp_path, *CONFIGS[name])
    for stage, lines in golden["metrics"].items():
        for line, other in zip(lines, found["metrics"][stage], strict=True):
            for key, value in line.items():
                close = (
                    value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-4)
                )
                assert other[key] == close, (stage, key)
    if machine() == GOLDEN["machine"]:  # elsewhere the last bits of a sum differ
        assert exact(found) == exact(golden)


def exact(facts: dict[str, Any]) -> dict[str, Any]:
    """Whatever the golden lines hold; later versions may log more."""
    metrics = {
        stage: [
            {key: own[key] for key in known}
            for known, own in zip(lines, facts["metrics"][stage], strict=True)
        ]
        for stage, lines in facts["metrics"].items()
    }
    return {**facts, "metrics": metrics}
