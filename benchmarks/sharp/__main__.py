"""Sharpness: squared error against perceptual and adversarial losses, from scratch or by tuning.

    python -m benchmarks.sharp --cifar10 DIR --flowers DIR --mobilenet FILE --squeezenet FILE

The folders hold train/ and test/ or val/. A cell that has finished is not run again, one that was
interrupted goes on. One network teaches, the other judges: never the same. Writes
benchmarks/results/sharp_BUDGET.json, the same pictures of all cells, and the tables in
docs/results.md.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.sharp.cells import BUDGETS, SIZES, Cell, Images, Weights, cells_of
from benchmarks.sharp.report import RESULTS, write_report
from benchmarks.sharp.run_cell import run_cell
from pipelines.config import DataConfig
from pipelines.data.sources import load_images


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/")
    parser.add_argument("--flowers", type=Path, help="folder with train/ and val/")
    parser.add_argument("--mobilenet", type=Path, required=True, help=".safetensors")
    parser.add_argument("--squeezenet", type=Path, required=True, help=".safetensors")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/sharp-BUDGET")
    parser.add_argument("--workers", type=int, help="cells at a time; default: the budget's")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no cell after so many")
    parser.add_argument("--only", nargs="+", default=[], help="names of cells, or parts of them")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    folder = arguments.run_dir or Path("runs") / f"sharp-{arguments.budget}"
    weights = Weights(arguments.mobilenet, arguments.squeezenet)
    data = {name: _data(name, arguments.cifar10, arguments.flowers) for name in budget.images}
    cells = {
        cell.name: cell
        for name, config in data.items()
        if config is not None
        for cell in cells_of(name)
    }
    if arguments.cell:
        cell = cells[arguments.cell]
        config = data[cell.images]
        assert config is not None
        run_cell(cell, budget, config, weights, folder)
        return
    if not arguments.report:
        for config in filter(None, data.values()):
            load_images(config, "train")  # decoded once, before cells need it
        chosen = [
            cell
            for name, cell in cells.items()
            if not arguments.only or any(part in name for part in arguments.only)
        ]
        run_all(
            chosen,
            arguments.workers or budget.num_workers,
            folder,
            time.monotonic() + 60 * arguments.minutes,
        )
    results = folder if arguments.budget == "tiny" else RESULTS
    write_report(folder, results, arguments.budget, list(cells.values()))


def _data(name: Images, cifar10: Path | None, flowers: Path | None) -> DataConfig | None:
    root, validation = (cifar10, "test") if name == "cifar10" else (flowers, "val")
    if root is None:
        return None
    return DataConfig(
        dataset="folder",
        root=root / "train",
        validation_root=root / validation,
        image_size=SIZES[name],
        horizontal_flip=True,
    )


def run_all(cells: list[Cell], num_workers: int, folder: Path, deadline: float) -> None:
    """Each cell in a process of its own, several at a time; those to be tuned first.

    Raises:
        SystemExit: a cell failed; its log is named.
    """
    missing = [cell for cell in cells if not (folder / cell.name / "result.json").exists()]
    for is_base in (True, False):
        with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
            jobs = [cell.name for cell in missing if (cell == cell.base) == is_base]
            futures = [pool.submit(_run_process, name, folder, deadline) for name in jobs]
            for done in concurrent.futures.as_completed(futures):
                if done.exception():
                    pool.shutdown(cancel_futures=True)
                print(done.result(), flush=True)


def _run_process(name: str, folder: Path, deadline: float) -> str:
    if time.monotonic() > deadline:
        return f"{name}: no time left"
    (folder / name).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.sharp", *sys.argv[1:], "--cell", name]
    path = folder / name / "log.txt"
    with path.open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
            raise SystemExit(f"{name} failed, see {path}")
    return f"{name}: done"


if __name__ == "__main__":
    main()
