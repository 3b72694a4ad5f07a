"""Reconstruction at equal bits, for the whole family, its baselines and what else is in use.

    python -m benchmarks.quality --data DIR --weights FILE --budget cpu

DIR holds train/ and test/ with a folder per class. Each cell is one training run in a folder of its
own: a finished one is not run again, an interrupted one goes on. Writes the table, the plots and
the sections of both pages from the cells' results.
"""

import argparse
import concurrent.futures
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.budgets import (
    BUDGETS,
    Budget,
    RateKey,
    ablation_cells,
    comparison_cells,
    every_cell,
    rate_cells,
)
from benchmarks.quality.cells import Cell, Setting
from benchmarks.quality.decoders import TUNED, run_tuning
from benchmarks.quality.report import write_report
from benchmarks.quality.run_cell import run_cell, run_extras
from benchmarks.quality.store import Store, final_error
from pipelines.command_configs import ExtractorConfig
from pipelines.config import DataConfig
from pipelines.data.sources import load_images


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with train/ and test/; none: `shapes`")
    parser.add_argument("--flowers", type=Path, help="128×128 images in train/ and test/")
    parser.add_argument("--weights", type=Path, help="MobileNetV2, .safetensors; none: no rFD")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/quality-BUDGET")
    parser.add_argument(
        "--store",
        type=Path,
        help="file of finished cells, which are not run again; default: RUN_DIR/cells.json",
    )
    parser.add_argument("--cell", help="train this cell alone, in this process")
    parser.add_argument("--extras", help="measure the distance and the prior of this cell alone")
    parser.add_argument("--decoder", help="fine-tune the decoder of this cell alone")
    parser.add_argument("--report", action="store_true", help="only write the report")
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    folder = arguments.run_dir or Path("runs") / f"quality-{arguments.budget}"
    data = data_configs(arguments.data, arguments.flowers)
    cells = {cell.name: cell for cell in every_cell(budget)}
    name = arguments.cell or arguments.extras or arguments.decoder
    if name:
        cell = cells[name]
        weights = extractor(arguments.weights) if arguments.weights else None
        if arguments.cell:
            run_cell(cell, budget, data[cell.setting], folder)
        else:
            measure = run_extras if arguments.extras else run_tuning
            measure(cell, budget, data[cell.setting], folder, weights)
        return
    store = Store(folder, arguments.store or folder / "cells.json")
    if not arguments.report:
        for config in data.values():
            load_images(config, "train")  # decoded once, before cells need it
        run_all(budget, folder, store, set(data))
    write_report(store, folder, arguments.budget)


def data_configs(root: Path | None, flowers: Path | None) -> dict[Setting, DataConfig]:
    """Training and validation images: a tenth of the training folder is held out."""
    own = DataConfig(horizontal_flip=True)
    if root is not None:
        own = DataConfig(dataset="folder", root=root / "train", horizontal_flip=True)
    configs: dict[Setting, DataConfig] = {"cifar10": own, "published": own}
    if flowers is not None:
        update = {"root": flowers / "train", "image_size": 128, "dataset": "folder"}
        configs["flowers"] = own.model_copy(update=update)
    return configs


def extractor(weights: Path) -> ExtractorConfig:
    """MobileNetV2 as its weights want it."""
    half = (0.5, 0.5, 0.5)
    return ExtractorConfig(kind="timm", weights=weights, pad_type="same", mean=half, std=half)


def run_all(budget: Budget, folder: Path, store: Store, settings: set[Setting]) -> None:
    """First the cells that choose the rates, then the others, then what only rows need."""
    run_cells("--cell", rate_cells(budget), budget, folder, store)
    rates = chosen_rates(budget, store)
    rows = [cell for cell in comparison_cells(budget, rates) if cell.setting in settings]
    run_cells("--cell", rows, budget, folder, store)
    run_cells("--cell", ablation_cells(budget, rates), budget, folder, store)
    # Of several seeds, the first alone.
    firsts = [cell for cell in rows if cell.seed == budget.seeds[0]]
    run_cells("--extras", firsts, budget, folder, store)
    tuned = [cell for cell in firsts if cell.method in TUNED]
    run_cells("--decoder", tuned, budget, folder, store)


def chosen_rates(budget: Budget, store: Store) -> dict[RateKey, float]:
    """By family and method: the rate with the lowest validation error at the last step."""
    errors: dict[RateKey, dict[float, float]] = {}
    for cell in rate_cells(budget):
        of_method = errors.setdefault(cell.rate_key, {})
        of_method[cell.rate] = final_error(store.results[cell.name])
    return {key: min(of_method, key=of_method.__getitem__) for key, of_method in errors.items()}


def run_cells(task: str, cells: Iterable[Cell], budget: Budget, folder: Path, store: Store) -> None:
    """Runs what has not finished, several at a time, each in a process of its own.

    Raises:
        SystemExit: a cell failed; its log is named.
    """
    is_done = {
        "--cell": store.has_result,
        "--extras": store.has_extras,
        "--decoder": store.has_decoder,
    }[task]
    missing = [cell.name for cell in cells if not is_done(cell.name)]
    with concurrent.futures.ThreadPoolExecutor(budget.num_workers) as pool:
        futures = [pool.submit(run_process, task, name, folder) for name in missing]
        for number, done in enumerate(concurrent.futures.as_completed(futures), 1):
            if done.exception():
                pool.shutdown(cancel_futures=True)
            print(f"{task[2:]} {number} of {len(missing)}: {done.result()}", flush=True)
            store.gather()


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
