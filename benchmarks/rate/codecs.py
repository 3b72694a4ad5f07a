"""Files of a tokenizer beside JPEG, WebP, AVIF and JPEG XL.

    python -m benchmarks.rate.codecs --flowers DIR --emoji DIR --budget cpu

The first DIR holds train/ and val/, the second pictures. Trains tokenizers with a prior of their
own on the photographs at 128×128, then codes validation photographs and emoji, which none of them
has seen. What has finished, also in the committed JSON, is not run again, a training that was
interrupted goes on. Writes benchmarks/results/rate_codecs_BUDGET.json, pictures at equal bytes,
and a table in benchmarks/README.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import origin
from benchmarks.rate.__main__ import command_of
from benchmarks.rate.codec_cells import BUDGETS, cells, data_config, originals
from benchmarks.rate.codec_report import write_report
from benchmarks.rate.report import RESULTS
from tokenizer.storage.files import replace_file


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rate.codecs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--flowers", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--emoji", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/rate-codecs-BUDGET")
    words = sys.argv[1:] if words is None else words
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    folder = arguments.run_dir or Path("runs") / f"rate-codecs-{arguments.budget}"
    results = folder if arguments.budget == "tiny" else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = results / f"rate_codecs_{arguments.budget}.json"
    budget = BUDGETS[arguments.budget]
    data = data_config(arguments.flowers, folder / "cache")
    images = originals(data, arguments.emoji, budget.num_images)
    found = {row["cell"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for cell, measure in cells(budget, data, images, folder):
        name = "_".join(cell.values())
        if name in found:
            continue
        started = time.process_time()
        points = measure()
        found[name] = {
            "cell": name,
            **cell,
            "num_images": len(images[cell["images"]]),
            "steps": budget.total_steps,
            "seed": 0,
            "processor_seconds": round(time.process_time() - started, 1),
            "points": points,
            **origin(command_of("benchmarks.rate.codecs", words)),
        }
        print(f"{name}: {found[name]['processor_seconds']:.0f} processor seconds", flush=True)
        write_results([*found.values()], path)
    write_report([*found.values()], images, folder, path, arguments.budget)


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A line for each."""
    text = "[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
