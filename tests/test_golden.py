"""Numbers that a change of structure must not move: losses, weights, codes, images.

`golden/runs.json` was written by commit 19c0523. A change of these numbers changes what people
get: it needs an entry in the change log.
"""

import json
from pathlib import Path

import pytest

from tests.golden.runs import golden_runs, machine, measure

GOLDEN = json.loads((Path(__file__).parent / "golden" / "runs.json").read_text())
CONFIGS = golden_runs()


@pytest.mark.parametrize("name", GOLDEN["runs"])
def test_a_run_gives_the_golden_numbers(name: str, tmp_path: Path) -> None:
    golden, found = GOLDEN["runs"][name], measure(tmp_path, *CONFIGS[name])
    is_exact = machine() == GOLDEN["machine"]  # elsewhere the last bits of a sum differ
    for stage, lines in golden["metrics"].items():
        for line, other in zip(lines, found["metrics"][stage], strict=True):
            for key, value in line.items():
                if key not in other:  # what a quantizer does not have is no longer logged
                    assert value in (0, 1) or not any(value), (stage, key)
                elif is_exact or isinstance(value, str):
                    assert other[key] == value, (stage, key)
                else:
                    assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (stage, key)
    if is_exact:
        assert {**found, "metrics": None} == {**golden, "metrics": None}
