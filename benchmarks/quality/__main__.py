"""Reconstruction at equal bits, for the whole family, its baselines and what else is in use.

    python -m benchmarks.quality --data DIR --weights FILE --budget cpu

DIR holds train/ and test/ with a folder per class. Each cell is one training run in a folder of its
own: a finished one is not run again, an interrupted one goes on. Writes the table, the plots and
the README's section from the cells' results.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.cells import (
    BUDGETS,
    Budget,
    Cell,
    ablation_cells,
    comparison_cells,
    every_cell,
    rate_cells,
)
from benchmarks.quality.report import write_report
from benchmarks.quality.run_cell import run_cell, run_extras
from pipelines.config import DataConfig
from pipelines.data import load_images
from pipelines.features import ExtractorConfig


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with train/ and test/; none: `shapes`")
    parser.add_argument("--weights", type=Path, help="MobileNetV2, .safetensors; none: no rFD")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/quality-BUDGET")
    parser.add_argument("--cell", help="train this cell alone, in this process")
    parser.add_argument("--extras", help="measure the distance and the prior of this cell alone")
    parser.add_argument("--report", action="store_true", help="only write the report")
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    folder = arguments.run_dir or Path("runs") / f"quality-{arguments.budget}"
    data = data_config(arguments.data)
    cells = {cell.name: cell for cell in every_cell(budget)}
    if arguments.cell:
        run_cell(cells[arguments.cell], budget, data, folder)
        return
    if arguments.extras:
        weights = extractor(arguments.weights) if arguments.weights else None
        run_extras(cells[arguments.extras], budget, data, folder, weights)
        return
    if not arguments.report:
        load_images(data, "train")  # decoded once, before cells need it
        run_all(budget, folder)
    write_report(folder, arguments.budget)


def data_config(root: Path | None) -> DataConfig:
    """Training and validation images: a tenth of the training folder is held out."""
    if root is None:
        return DataConfig(horizontal_flip=True)
    return DataConfig(dataset="folder", root=root / "train", horizontal_flip=True)


def extractor(weights: Path) -> ExtractorConfig:
    """MobileNetV2 as its weights want it."""
    half = (0.5, 0.5, 0.5)
    return ExtractorConfig(kind="timm", weights=weights, pad_type="same", mean=half, std=half)


def run_all(budget: Budget, folder: Path) -> None:
    """First the cells that choose the rates, then the others, then what only rows need."""
    run_cells("--cell", rate_cells(budget), budget, folder)
    rates = chosen_rates(budget, folder)
    rows = list(comparison_cells(budget, rates))
    run_cells("--cell", rows, budget, folder)
    run_cells("--cell", ablation_cells(budget, rates), budget, folder)
    run_cells("--extras", rows, budget, folder)


def chosen_rates(budget: Budget, folder: Path) -> dict[tuple[str, str], float]:
    """By family and method: the rate with the lowest validation error at the last step."""
    errors: dict[tuple[str, str], dict[float, float]] = {}
    for cell in rate_cells(budget):
        result = json.loads((folder / cell.name / "result.json").read_text())
        of_method = errors.setdefault(cell.rate_key, {})
        of_method[cell.rate] = result["validation"]["RMSE"][1][-1]
    return {key: min(of_method, key=of_method.__getitem__) for key, of_method in errors.items()}


def run_cells(task: str, cells: Iterable[Cell], budget: Budget, folder: Path) -> None:
    """Runs what has not finished, several at a time, each in a process of its own.

    Raises:
        SystemExit: a cell failed; its log is named.
    """
    target = {"--cell": "result.json", "--extras": "extras.json"}[task]
    missing = [cell.name for cell in cells if not (folder / cell.name / target).exists()]
    with concurrent.futures.ThreadPoolExecutor(budget.num_workers) as pool:
        futures = [pool.submit(run_process, task, name, folder) for name in missing]
        for number, done in enumerate(concurrent.futures.as_completed(futures), 1):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            print(f"{task[2:]} {number} of {len(missing)}: {done.result()}", flush=True)


def run_process(task: str, name: str, folder: Path) -> str:
    """Runs one cell with the arguments of this process."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], task, name]
    path = folder / name / "log.txt"
    with path.open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
            raise SystemExit(f"{shlex.join(command)} failed, see {path}")
    return name


if __name__ == "__main__":
    main()
