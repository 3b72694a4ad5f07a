"""How the cost of a training step grows, and what a large run needs.

    python -m benchmarks.speed.scaling cpu [RESULTS]

writes `RESULTS/scaling_BUDGET.json` and a plot per curve; without RESULTS into this project's, and
the tables of `scaling.md`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.machine import origin
from benchmarks.speed.launches import processes, sharded_losses
from benchmarks.speed.measure import Budget, device_of
from benchmarks.speed.requirements import requirements
from benchmarks.speed.steps import prior_step, repeated, tokenizer_step
from prior.config import PriorNetworkConfig
from tokenizer.builders import rsq_vae
from tokenizer.code_maps import code_maps_of
from tokenizer.config import NetworkConfig, TokenizerConfig

RESULTS = Path(__file__).parents[1] / "results"
NETWORKS = NetworkConfig(patch_size=4, width=64, max_width=64)


class Curve(NamedTuple):
    """A step whose size is one number."""

    title: str
    step: Callable[[int], Callable[[], None]]
    values: Mapping[Budget, tuple[int, ...]]


def _tokenizer(depth: int = 1, codebook_size: int = 256) -> TokenizerConfig:
    return rsq_vae(8, depth, codebook_size, 32, networks=NETWORKS)


def curves(device: torch.device) -> dict[str, Curve]:
    """By what grows; everything else stays."""

    def layers(num_spatial_layers: int) -> Callable[[], None]:
        network = PriorNetworkConfig(
            width=128, num_spatial_layers=num_spatial_layers, num_depth_layers=1, num_heads=4
        )
        maps = code_maps_of(_tokenizer(4, 64).groups, 32, 32)
        return prior_step(network, maps, 8, device)

    return {
        "codes": Curve(
            "K, one layer of 8×8, 16 images",
            lambda size: tokenizer_step(_tokenizer(1, size), 32, 16, device),
            {
                "tiny": (16, 32),
                "cpu": (64, 256, 1024, 4096),
                "gpu": (64, 256, 1024, 4096, 16384),
            },
        ),
        "depth": Curve(
            "residual layers of 8×8, K 256, 16 images",
            lambda depth: tokenizer_step(_tokenizer(depth), 32, 16, device),
            {"tiny": (1, 2), "cpu": (1, 2, 4, 8, 16), "gpu": (1, 2, 4, 8, 16, 32)},
        ),
        "image_size": Curve(
            "image side in pixels, one layer at a quarter of it, 4 images",
            lambda side: tokenizer_step(_tokenizer(), side, 4, device),
            {"tiny": (16, 32), "cpu": (32, 64, 128), "gpu": (32, 64, 128, 256)},
        ),
        "batch": Curve(
            "images of a batch, one layer of 8×8, K 256",
            lambda batch: tokenizer_step(_tokenizer(), 32, batch, device),
            {"tiny": (2, 4), "cpu": (4, 8, 16, 32, 64, 128), "gpu": (16, 32, 64, 128, 256, 512)},
        ),
        "layers": Curve(
            "layers of the prior's spatial transformer, width 128, 8×8×4 codes, 8 images",
            layers,
            {"tiny": (1, 2), "cpu": (2, 4, 8, 16), "gpu": (2, 4, 8, 16, 32)},
        ),
    }


def exponents(values: list[int], seconds: list[float]) -> tuple[float, float]:
    """Slopes in logarithms: by least squares over all values, and between the last two."""
    x, y = np.log(values), np.log(seconds)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())
    return slope, float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def measure_curve(curve: Curve, budget: Budget) -> dict[str, Any]:
    """Seconds per step at each value, the values in turn; the median of the rounds."""
    values = list(curve.values[budget])
    count, rounds = (1, 1) if budget == "tiny" else (3, 5)
    calls = [repeated(curve.step(value), count) for value in values]
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in values]
    for _ in range(rounds):
        for own, call in zip(taken, calls, strict=True):
            started = time.perf_counter()
            call()
            own.append((time.perf_counter() - started) / count)
    seconds = [statistics.median(own) for own in taken]
    fitted, last = exponents(values, seconds)
    return {
        "title": curve.title,
        "values": values,
        "seconds": seconds,
        "exponent": fitted,
        "last_exponent": last,
    }


def measurements(budget: Budget) -> dict[str, Any]:
    """The curves, several processes, a sharded prior, and what a large run needs."""
    device = device_of(budget)
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    results: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "curves": {name: measure_curve(curve, budget) for name, curve in curves(device).items()},
        "requirements": requirements(),
    }
    if budget == "cpu" or num_gpus > 1:
        results["processes"] = processes(budget, max(num_gpus, 2))
        results["sharding"] = sharded_losses(max(num_gpus, 2))
    return results


def plot_curve(curve: Mapping[str, Any], path: Path) -> None:
    """Measured points and the fitted power, both axes logarithmic."""
    values, seconds = np.array(curve["values"]), np.array(curve["seconds"])
    slope = curve["exponent"]
    level = np.exp(np.mean(np.log(seconds) - slope * np.log(values)))
    figure = Figure((4, 3), layout="constrained")
    axes = figure.subplots()
    axes.loglog(values, level * values**slope, color="0.7", label=f"exponent {slope:.2f}")
    axes.loglog(values, seconds, "o", label="measured")
    axes.set_xticks(values, [str(value) for value in values])
    ends = seconds[[0, -1]]
    axes.set_yticks(ends, [f"{1000 * own:.3g}" for own in ends])
    axes.minorticks_off()
    axes.set(xlabel=curve["title"], ylabel="milliseconds per step")
    axes.xaxis.label.set_fontsize(8)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, and writes what the page shows."""
    from benchmarks.speed.scaling_page import write_page

    budget = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    results = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS
    if budget not in get_args(Budget):
        sys.exit(f"error: the budget must be one of {', '.join(get_args(Budget))}, got {budget}")
    torch.set_num_threads(1)  # several would wait for each other where others use the machine, too
    found = measurements(budget)  # type: ignore[arg-type]
    metadata = origin(f"python -m benchmarks.speed.scaling {budget}")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"scaling_{budget}.json"
    path.write_text(json.dumps(metadata | found, indent=2) + "\n")
    for name, curve in found["curves"].items():
        plot_curve(curve, results / f"scaling_{budget}_{name}.png")
    if results == RESULTS and budget != "tiny":  # the page shows what lies there
        write_page(path)


if __name__ == "__main__":
    main()
