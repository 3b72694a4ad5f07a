"""The frame of the speed benchmarks: what is compared, and how it is timed."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Budget = Literal["tiny", "cpu", "gpu"]


class Comparison(NamedTuple):
    """Contenders that do the same work, timed in turn."""

    name: str
    contenders: Mapping[str, Callable[[], Callable[[], None]]]
    """Name to set-up, which returns what is timed; the first is ours."""
    unit: str
    amount: float
    """Units per call."""
    rounds: int = 5
    details: Mapping[str, Any] = {}


def measure(comparison: Comparison) -> dict[str, Any]:
    """Units per second of each contender: the median of the rounds."""
    calls = {name: set_up() for name, set_up in comparison.contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(comparison.rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: comparison.amount / statistics.median(own) for name, own in seconds.items()}
    return {"unit": f"{comparison.unit}/s", "rates": rates, "details": dict(comparison.details)}
