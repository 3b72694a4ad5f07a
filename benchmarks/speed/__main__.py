"""Speed and memory of quantization, training and sampling, and how they grow.

    python -m benchmarks.speed --budget cpu

Each comparison times ours and what it is compared with in turn, in a process of its own, and then
the peak memory of each. What is finished is not measured again; writes the JSON and the table in
benchmarks/README.md, and (`benchmarks.speed.scaling`) the plots and numbers of scaling.md.
"""

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.machine import origin
from benchmarks.speed.measure import Budget, Comparison, measure, peak_memory
from benchmarks.speed.report import write_report
from tokenizer.storage.files import replace_file

PARTS = ("quantization", "training", "sampling")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", choices=get_args(Budget), default="cpu")
    parser.add_argument(
        "--parts", nargs="+", choices=(*PARTS, "scaling"), default=(*PARTS, "scaling")
    )
    parser.add_argument("--run-dir", type=Path, help="default: runs/speed-BUDGET")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON and plots")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    if arguments.budget == "gpu" and not arguments.report and not torch.cuda.is_available():
        parser.error("--budget gpu needs a CUDA device")
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure_one(arguments.budget, *arguments.one)))
        return
    folder = arguments.run_dir or Path("runs") / f"speed-{arguments.budget}"
    if not arguments.report:
        for part in PARTS:
            if part in arguments.parts:
                run_part(part, arguments.budget, folder, arguments.threads)
        if "scaling" in arguments.parts and not (folder / "scaling").exists():
            print("scaling", flush=True)
            command = [sys.executable, "-m", "benchmarks.speed.scaling", arguments.budget]
            command.append(str(arguments.results))
            if subprocess.run(command).returncode:
                raise SystemExit(f"{shlex.join(command)} failed")
            (folder / "scaling").mkdir(parents=True)
    path = arguments.results / f"speed_{arguments.budget}.json"
    if not path.exists() and not any(folder.glob("*/*.json")):
        raise SystemExit(f"nothing has been measured yet: neither in {folder} nor in {path}")
    gather(folder, path)
    if arguments.results == RESULTS:  # the page shows what lies there
        write_report(arguments.results, arguments.budget)


def measure_one(
    budget: Budget, part: str, name: str = "", contender: str = ""
) -> dict[str, Any] | int | None:
    """A comparison, the memory of one of its contenders, or what a part measures besides."""
    module = importlib.import_module(f"benchmarks.speed.{part}")
    if not name:
        metadata: dict[str, Any] = module.measurements(budget)
        return metadata
    comparison = next(own for own in module.comparisons(budget) if own.name == name)
    if contender:
        return peak_memory(comparison.contenders[contender])
    return measure(comparison)


def run_part(part: str, budget: Budget, folder: Path, threads: int) -> None:
    """Measures what is missing; a file each."""
    module = importlib.import_module(f"benchmarks.speed.{part}")
    comparisons: Iterable[Comparison] = getattr(module, "comparisons", lambda _: ())(budget)
    for comparison in comparisons:
        path = folder / part / f"{re.sub('[^0-9a-z]+', '-', comparison.name.lower())}.json"
        if path.exists():
            continue
        print(f"{part}: {comparison.name}", flush=True)
        metadata = in_process(budget, threads, part, comparison.name)
        for name in comparison.contenders:
            memory = in_process(budget, threads, part, comparison.name, name)
            metadata["contenders"][name]["peak_memory"] = memory
        store(path, metadata)
    path = folder / part / "measurements.json"
    if hasattr(module, "measurements") and not path.exists():
        print(f"{part}: measurements", flush=True)
        store(path, in_process(budget, threads, part))


def in_process(budget: Budget, threads: int, *one: str) -> Any:
    """What `measure_one` gives in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    options = ["--budget", budget, "--threads", str(threads), "--one", *one]
    command = [sys.executable, "-m", "benchmarks.speed", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def store(path: Path, metadata: dict[str, Any]) -> None:
    """The metadata, with how they came about."""
    metadata |= origin(f"python -m benchmarks.speed {shlex.join(sys.argv[1:])}")
    metadata["threads"] = torch.get_num_threads()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(metadata) + "\n"))


def gather(folder: Path, path: Path) -> None:
    """All that has been measured, into one file: by part, `comparisons` and `measurements`.

    What another run has left there stays where this one has nothing.
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in PARTS:
        own = found.setdefault(part, {"comparisons": {}})
        for file in sorted(folder.glob(f"{part}/*.json")):
            metadata = json.loads(file.read_text())
            if file.stem == "measurements":
                own["measurements"] = metadata
            else:
                own["comparisons"][metadata["name"]] = metadata
    text = json.dumps(found, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
