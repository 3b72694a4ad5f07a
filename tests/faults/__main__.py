"""Runs all trials of what can go wrong: `python -m tests.faults`.

A family that has finished is not run again. Prints what was tried, survived and lost, writes
benchmarks/results/faults.json and the table in RELIABILITY.md, and exits with status 1 if anything
was lost.
"""

import argparse
import importlib
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import commit, machine
from benchmarks.readme import README, markdown_table, replace_section

RESULTS = README.parent / "benchmarks" / "results" / "faults.json"
FAMILIES = ["kills", "disk", "data", "configuration", "checkpoints", "numbers"]
FAMILIES += ["processes", "memory", "files", "elastic", "resharding"]
"""Modules with `NUM_TRIALS` and `trial(folder, number, generator)`, which returns a complaint."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--trials", type=int, default=None, help="default: each family's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # mounted disks must go
    logging.disable(logging.WARNING)  # the trials provoke hundreds
    for family in arguments.families:
        record_family(family, arguments.folder, arguments.trials, arguments.seed)
    results = collect(arguments.folder)
    print(table(results))
    replace_section("faults", table(results), README.with_name("RELIABILITY.md"))
    notes = [f"{family}: {note}" for family, own in results.items() for note in own["notes"]]
    if notes:
        raise SystemExit("\n".join(notes))


def run_trials(family: str, folder: Path, numbers: Iterable[int], seed: int) -> list[str]:
    """What went wrong, a line for each trial that was lost."""
    module = importlib.import_module(f"tests.faults.{family}")
    folder.mkdir(parents=True, exist_ok=True)
    trials = (
        (number, module.trial(folder, number, np.random.default_rng([seed, number])))
        for number in numbers
    )
    return [f"trial {number}: {complaint}" for number, complaint in trials if complaint]


def record_family(family: str, folder: Path, num_trials: int | None, seed: int) -> None:
    """Runs one family and writes its result, unless that is there."""
    record = folder / f"{family}.json"
    if record.exists():
        return
    if num_trials is None:
        num_trials = importlib.import_module(f"tests.faults.{family}").NUM_TRIALS
    started = time.perf_counter()
    notes = run_trials(family, folder / family, range(num_trials), seed)
    result = {
        "tried": num_trials,
        "survived": num_trials - len(notes),
        "lost": len(notes),
        "notes": notes,
        "command": shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]]),
        "commit": commit(),
        "seed": seed,
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
    }
    record.write_text(json.dumps(result, indent=1) + "\n")


def collect(folder: Path) -> dict[str, Any]:
    """Gathers the finished families into one file."""
    results = {
        family: json.loads(path.read_text())
        for family in FAMILIES
        if (path := folder / f"{family}.json").exists()
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The counts, as RELIABILITY.md shows them."""
    counts = ("tried", "survived", "lost")
    rows = ([family, *(str(own[key]) for key in counts)] for family, own in results.items())
    return markdown_table(["trials", *counts], rows)


if __name__ == "__main__":
    main()
