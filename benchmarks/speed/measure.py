"""The frame of the speed benchmarks: what is compared, and how time and memory are taken."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

Budget = Literal["tiny", "cpu", "gpu"]


class Comparison(NamedTuple):
    """Contenders that do the same work, timed in turn, so that a busy machine is so for all."""

    name: str
    contenders: Mapping[str, Callable[[], Callable[[], None]]]
    """Name to set-up, which returns what is timed; the first is ours."""
    unit: str
    amount: float
    """Units per call."""
    rounds: int = 5
    details: Mapping[str, Any] = {}
    targets: Mapping[str, float] = {}
    """How many times as fast as a contender ours should be."""


def device_of(budget: Budget) -> torch.device:
    """A GPU if the budget is for one and there is one."""
    return torch.device("cuda" if budget == "gpu" and torch.cuda.is_available() else "cpu")


def wait_for_gpu() -> None:
    """Waits until the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # only on a GPU


def measure(comparison: Comparison) -> dict[str, Any]:
    """Rates with their quartiles, and how many times as fast ours is: medians of the rounds.

    A ratio is taken within each round, between calls that ran one after the other.
    """
    calls = {name: set_up() for name, set_up in comparison.contenders.items()}
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(comparison.rounds):
        for name, call in calls.items():
            wait_for_gpu()
            started = time.perf_counter()
            call()
            wait_for_gpu()
            seconds[name].append(time.perf_counter() - started)
    own = next(iter(seconds.values()))
    results = {}
    for name, taken in seconds.items():
        rates = [comparison.amount / second for second in taken]
        ratios = [second / mine for mine, second in zip(own, taken, strict=True)]
        results[name] = {
            "seconds": statistics.median(taken),
            "rate": quartiles(rates)[1],
            "rate_quartiles": quartiles(rates)[::2],
            "ours_is_times_as_fast": statistics.median(ratios),
            "target": comparison.targets.get(name),
        }
    return {
        "name": comparison.name,
        "unit": f"{comparison.unit}/s",
        "rounds": comparison.rounds,
        "contenders": results,
        "details": dict(comparison.details),
    }


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def peak_memory(set_up: Callable[[], Callable[[], None]]) -> int | None:
    """Bytes that the first call takes above what its set-up holds; for a process of its own.

    On a CPU from Linux's high-water mark of the process, None elsewhere.
    """
    call = set_up()
    if torch.cuda.is_available():  # only on a GPU
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
