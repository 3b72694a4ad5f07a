"""Peak memory of the metrics of generated images, of few images and of many.

    python -m benchmarks.speed.evaluation [RESULTS]

writes `RESULTS/evaluation_memory_cpu.json`. Features are random numbers, written in shares and read
back as an evaluation does; each measurement is of a process of its own. Precision and recall, whose
distances take time by the square of the number of images, are of fewer features: their memory
beside a block of features is that of its distances.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.machine import origin
from benchmarks.speed.measure import peak_memory
from pipelines.evaluation.feature_shares import StoredFeatures, stored_features
from pipelines.evaluation.features import FeatureOutput
from pipelines.evaluation.metrics import (
    IS_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NUM_NEIGHBORS,
    frechet_distance,
)
from pipelines.evaluation.streaming import inception_score, kernel_distance, precision_and_recall
from tokenizer.storage.files import replace_file

RESULTS = Path(__file__).parents[1] / "results"
NUMBERS = (5_000, 50_000)
CLASSES = 1_000
DIMS = {"FD, IS and KID": 1_280, "precision and recall": 64}
"""Features by what is measured."""


def written(folder: Path, number: int, dim: int) -> StoredFeatures:
    """Random features of so many images, in shares."""

    def extract(first: int, count: int, title: str) -> FeatureOutput:
        generator = torch.Generator().manual_seed(first)
        columns = (torch.randn(count, size, generator=generator) for size in (dim, CLASSES))
        return FeatureOutput(*columns)

    return stored_features(folder, {"folder": folder.name}, number, extract, Accelerator(), "")


def call(name: str, folder: Path, number: int, dim: int) -> Callable[[], None]:
    """Writes and measures two sets."""

    def measure() -> None:
        ours, theirs = (written(folder / side, number, dim) for side in ("ours", "theirs"))
        if name == "precision and recall":
            precision_and_recall(ours.features, theirs.features, NUM_NEIGHBORS)
            return
        frechet_distance(ours.features, theirs.features)
        inception_score(ours.logits, IS_SPLITS, 0)
        subset_size = min(KID_SUBSET_SIZE, number)
        kernel_distance(ours.features, theirs.features, KID_SUBSETS, subset_size, 0)

    return measure


def measure_one(name: str, number: int, dim: int) -> dict[str, Any]:
    """Bytes above what is held before, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        call(name, Path(folder), 100, dim)()  # loads and allocates what is there from then on
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        memory = peak_memory(lambda: call(name, Path(folder), number, dim))
        return {"peak_memory": memory, "seconds": time.perf_counter() - started}


def main() -> None:
    """Measures each in a process of its own."""
    module = "benchmarks.speed.evaluation"
    if len(sys.argv) == 5:
        name, number, dim = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        print(json.dumps(measure_one(name, number, dim)))
        return
    rows = []
    for name, dim in DIMS.items():
        for number in NUMBERS:
            command = [sys.executable, "-m", module, "--one", name, str(number), str(dim)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"metrics": name, "num_images": number, "num_features": dim, **found})
            print(rows[-1], flush=True)
    results = origin(f"python -m {module}") | {"threads": torch.get_num_threads(), "rows": rows}
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else RESULTS
    text = json.dumps(results, indent=1) + "\n"
    replace_file(folder / "evaluation_memory_cpu.json", lambda own: own.write_text(text))


if __name__ == "__main__":
    main()
