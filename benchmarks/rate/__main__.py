"""Bits and errors of the whole family and its fair baselines, with priors and with search.

    python -m benchmarks.rate --data DIR --budget cpu

DIR holds train/ and test/. A cell that has finished, also one in the committed JSON, is not run
again; one that was interrupted goes on. Cells run one after the other in this process; to run two
at a time start it twice, with other `--cells`. After each cell JSON, plot and table are written
anew: benchmarks/results/rate_BUDGET.json and benchmarks/README.md. Files are the subject of
`benchmarks.rate.codecs`.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rate.cells import BUDGETS, Cell, cells_of
from benchmarks.rate.report import RESULTS, gathered, write_report
from benchmarks.rate.run_cell import run_cell
from pipelines.config import DataConfig


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with train/ and test/; none: `shapes`")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/rate-BUDGET")
    parser.add_argument("--cells", nargs="+", default=[], help="names of cells, or parts of them")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell after so many")
    parser.add_argument("--report", action="store_true", help="only write the report")
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    folder = arguments.run_dir or Path("runs") / f"rate-{arguments.budget}"
    results = folder if arguments.budget == "tiny" else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = results / f"rate_{arguments.budget}.json"
    budget, cells = BUDGETS[arguments.budget], cells_of(BUDGETS[arguments.budget])
    data = data_config(arguments.data, folder)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.report:
        write_report(gathered(folder, path, cells), path, arguments.budget)
        return
    for cell in chosen(cells, arguments.cells):
        if cell.name in gathered(folder, path, cells) or time.monotonic() > deadline:
            continue
        started = time.process_time()
        run_cell(cell, budget, data, folder, command_of("benchmarks.rate", words))
        print(f"{cell.name}: {time.process_time() - started:.0f} processor seconds", flush=True)
        write_report(gathered(folder, path, cells), path, arguments.budget)


def data_config(root: Path | None, folder: Path) -> DataConfig:
    """Training images, and the test images as those of validation: nothing is chosen by them."""
    config = DataConfig(horizontal_flip=True, cache_dir=folder / "cache")
    if root is None:
        return config.model_copy(update={"num_images": 600, "num_validation_images": 100})
    update = {"root": root / "train", "validation_root": root / "test", "dataset": "folder"}
    return config.model_copy(update=update)


def chosen(cells: Sequence[Cell], parts: Sequence[str]) -> list[Cell]:
    """Cells whose names have one of these parts, all where there are none."""
    return [cell for cell in cells if not parts or any(part in cell.name for part in parts)]


def command_of(module: str, words: Sequence[str]) -> str:
    """As results name it: paths as their last parts."""
    shown = (Path(word).name if "/" in word else word for word in words)
    return shlex.join(["python", "-m", module, *shown])


if __name__ == "__main__":
    main()
