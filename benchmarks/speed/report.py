"""The table of the speed benchmarks, from the JSON alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.readme import README, markdown_table, replace_section

PAGE = README.parent / "benchmarks" / "README.md"
HEADER = (
    "work",
    "contender",
    "rate",
    "quartiles",
    "unit",
    "ours is × as fast",
    "target",
    "peak memory, MiB",
)


LOOP_HEADER = (
    "loop",
    "M parameters",
    "images/s",
    "outside forward and backward, % (target < 5)",
    "of each stretch, %",
    "FLOPs utilization, %",
)


def write_report(results: Path, budget: str, page: Path = PAGE) -> None:
    """Writes the section `speed-BUDGET`, if the page has one, and the plots."""
    found = json.loads((results / f"speed_{budget}.json").read_text())
    if f"<!-- speed-{budget} -->" in page.read_text():
        tables = [markdown_table(HEADER, _rows(found))]
        loop = found["training"].get("measurements")
        if loop is not None:
            tables.append(markdown_table(LOOP_HEADER, _loop_rows(loop)))
        replace_section(f"speed-{budget}", "\n\n".join(tables), page)


def _rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for part, own in found.items():
        for comparison in own["comparisons"].values():
            name = f"**{part}**: {comparison['name']}"
            for number, (contender, metadata) in enumerate(comparison["contenders"].items()):
                is_ours = number == 0
                limit = comparison.get("details", {}).get("images_per_second_at_bandwidth")
                if is_ours and limit is not None:  # only on a GPU
                    name += f" (memory bandwidth allows {_number(limit)})"
                yield [
                    name if is_ours else "",
                    f"**{contender}**" if is_ours else contender,
                    _number(metadata["rate"]),
                    " to ".join(_number(rate) for rate in metadata["rate_quartiles"]),
                    comparison["unit"],
                    "" if is_ours else _number(metadata["ours_is_times_as_fast"]),
                    "" if metadata["target"] is None else f"≥ {metadata['target']:g}",
                    _memory(metadata.get("peak_memory")),
                ]


def _loop_rows(loop: Mapping[str, Any]) -> Iterator[list[str]]:
    for stage in ("stage one", "stage two"):
        metadata = loop[stage]
        utilization = metadata["utilization"]
        yield [
            stage,
            f"{metadata['parameters'] / 1e6:.1f}",
            _number(metadata["images_per_second"]),
            f"{100 * metadata['share_outside_forward_and_backward']:.1f}",
            ", ".join(f"{100 * share:.1f}" for share in metadata["shares_of_stretches"]),
            "" if utilization is None else f"{100 * utilization:.0f}",
        ]


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
