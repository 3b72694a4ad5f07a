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
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, machine
from benchmarks.readme import README, replace_section

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
FAMILIES = (
    "kills",
    "disk",
    "data",
    "configuration",
    "checkpoints",
    "numbers",
    "processes",
    "memory",
)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--trials", type=int, default=None, help="default: each family's own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # mounted disks must go
    logging.disable(logging.WARNING)  # the trials provoke hundreds
    for family in arguments.families:
        run_family(family, arguments.folder, arguments.trials, arguments.seed)
    results = collect(arguments.folder)
    print(table(results))
    replace_section("faults", markdown(results), README.with_name("RELIABILITY.md"))
    if any(entry["lost"] for entry in results.values()):
        raise SystemExit(1)


def run_family(family: str, folder: Path, num_trials: int | None, seed: int) -> None:
    """Runs one family, unless its result is there."""
    record = folder / f"{family}.json"
    if record.exists():
        return
    module = importlib.import_module(f"tests.faults.{family}")
    (folder / family).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tally = module.run(
        folder / family, module.NUM_TRIALS if num_trials is None else num_trials, seed
    )
    facts = {
        **tally._asdict(),
        "command": shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]]),
        "commit": commit(),
        "seed": seed,
        "seconds": round(time.perf_counter() - started),
        "machine": machine(),
    }
    record.write_text(json.dumps(facts, indent=1) + "\n")


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
    """A line per family, then a line for each loss."""
    lines = [f"{'family':16}{'tried':>8}{'survived':>10}{'lost':>6}"]
    for family, entry in results.items():
        counts = f"{entry['tried']:8}{entry['survived']:10}{entry['lost']:6}"
        lines.append(f"{family:16}{counts}")
    lines += [f"{family}: {note}" for family, entry in results.items() for note in entry["notes"]]
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The counts for RELIABILITY.md."""
    lines = ["| trials | tried | survived | lost |", "|---|---|---|---|"]
    for family, entry in results.items():
        lines.append(f"| {family} | {entry['tried']} | {entry['survived']} | {entry['lost']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
