"""The JSON of all cells, and the tables and sections that are made from it."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.decoders import decoder_table
from benchmarks.quality.figures import RESULTS, write_figures
from benchmarks.quality.store import Result, Store, final_error
from benchmarks.readme import README, markdown_table, replace_section

PAGE = README.parent / "benchmarks" / "README.md"
DISTANCE = "rFD-MobileNetV2"


def write_report(store: Store, folder: Path, budget: str) -> None:
    """Writes JSON, plots, and the sections of both pages, if the page has some of this budget."""
    cells = list(store.results.values())
    (RESULTS / f"quality_{budget}.json").write_text(store.to_json())
    write_figures(folder, rows_of(cells), budget)
    if f"<!-- quality-{budget} -->" not in PAGE.read_text():
        return
    replace_section(f"quality-{budget}", main_table(cells), PAGE)
    replace_section(f"ablations-{budget}", ablation_table(cells), PAGE)
    replace_section(f"decoders-{budget}", decoder_table(cells), PAGE)
    replace_section(f"rates-{budget}", rate_table(cells), PAGE)
    replace_section("quality", summary_table(cells))


class Row:
    """The seeds of one method at one shape."""

    def __init__(self, cells: Sequence[Result]) -> None:
        self.cells = cells
        self.first = cells[0]

    def value(self, name: str) -> float | None:
        """Mean over the seeds; None where the method has no such number."""
        values = [cell["test"].get(name) for cell in self.cells]
        return None if None in values else statistics.mean(values)

    def layers(self, name: str) -> list[float]:
        """Mean over the seeds, by layer."""
        columns = zip(*(cell["test"][name] for cell in self.cells), strict=True)
        return [statistics.mean(column) for column in columns]

    def spread(self) -> str:
        """RMSE×100, with half the range where there are several seeds."""
        values = [100 * cell["test"]["RMSE"] for cell in self.cells]
        half_range = (max(values) - min(values)) / 2
        mean = f"{statistics.mean(values):.2f}"
        return f"{mean} ± {half_range:.2f}" if len(values) > 1 else mean


def rows_of(cells: Sequence[Result]) -> list[Row]:
    """The rows of the table: seeds together, of each method the chosen rate alone."""
    best: dict[tuple[str, str], dict[float, float]] = {}
    cells = [cell for cell in cells if final_error(cell) < math.inf]
    for cell in cells:
        if not cell["ablation"]:
            of_method = best.setdefault((cell["shape"], cell["method"]), {})
            of_method.setdefault(cell["rate"], final_error(cell))
    rows = []
    for (shape, method), rates in best.items():
        rate = min(rates, key=rates.__getitem__)
        own = [
            cell
            for cell in cells
            if (cell["shape"], cell["method"], cell["rate"]) == (shape, method, rate)
            and not cell["ablation"]
        ]
        rows.append(Row(own))
    return sorted(rows, key=lambda row: (row.value("nominal_bits") or 0, row.first["shape"]))


def baseline_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fair baseline at the same shape."""
    return next(
        (
            other
            for other in rows
            if other.first["shape"] == row.first["shape"] and other.first["method"] == "nearest"
        ),
        None,
    )


def steps_to_reach(row: Row, error: float) -> str:
    """First validated step at which the row's mean error is not above `error`."""
    curves = [cell["validation"]["RMSE"] for cell in row.cells]
    steps = curves[0][0]
    for position, step in enumerate(steps):
        if statistics.mean(curve[1][position] for curve in curves) <= error:
            return f"{step}"
    return f"> {steps[-1]}"


Column = tuple[str, Callable[[Row, Sequence[Row]], str]]


def _number(name: str, digits: int, factor: float = 1) -> Callable[[Row, Sequence[Row]], str]:
    def text(row: Row, rows: Sequence[Row]) -> str:
        value = row.value(name)
        return "" if value is None else f"{factor * value:.{digits}f}"

    return text


def _list(name: str, digits: int, factor: float = 1) -> Callable[[Row, Sequence[Row]], str]:
    return lambda row, rows: ", ".join(f"{factor * v:.{digits}f}" for v in row.layers(name))


def _distance(row: Row, rows: Sequence[Row]) -> str:
    value, floor = row.value(DISTANCE), row.value(f"{DISTANCE} floor")
    return "" if value is None or floor is None else f"{value:.0f} ({floor:.0f})"


def _steps(row: Row, rows: Sequence[Row]) -> str:
    baseline = baseline_of(row, rows)
    if baseline is None:
        return ""
    final = statistics.mean(cell["validation"]["RMSE"][1][-1] for cell in baseline.cells)
    return steps_to_reach(row, final)


COLUMNS: tuple[Column, ...] = (
    ("code maps", lambda row, rows: row.first["shape"]),
    ("method", lambda row, rows: row.first["title"]),
    ("RMSE×100", lambda row, rows: row.spread()),
    ("PSNR", _number("PSNR", 2)),
    ("SSIM", _number("SSIM", 3)),
    ("rFD (floor)", _distance),
    ("perplexity", _list("perplexity", 0)),
    ("usage, %", _list("codebook_usage", 0, 100)),
    ("nominal bits", _number("nominal_bits", 0)),
    ("marginal bits", _number("marginal_bits", 0)),
    ("bits under a prior", _number("prior_bits", 0)),
    ("bound, bits/dim", _number("bound_bits_per_dim", 2)),
    (
        "images/s",
        lambda row, rows: f"{statistics.mean(c['images_per_second'] for c in row.cells):.0f}",
    ),
    ("steps to the baseline's error", _steps),
    ("rate", lambda row, rows: f"{row.first['rate']:g}"),
)


def main_table(cells: Sequence[Result]) -> str:
    """Every method at every shape; the lowest error of a shape in bold."""
    rows = rows_of(cells)
    lines = []
    for row in rows:
        rivals = [other for other in rows if other.first["shape"] == row.first["shape"]]
        texts = [text(row, rows) for _, text in COLUMNS]
        if row is min(rivals, key=lambda other: other.value("RMSE") or 1):
            texts[2] = f"**{texts[2]}**"
        lines.append(texts)
    return markdown_table([name for name, _ in COLUMNS], lines)


SUMMARY = ("code maps", "method", "RMSE×100", "perplexity", "nominal bits", "marginal bits")


def summary_table(cells: Sequence[Result]) -> str:
    """Ours and the fair baseline, for the front page."""
    rows = [row for row in rows_of(cells) if row.first["method"] in ("stochastic", "nearest")]
    columns = [column for column in COLUMNS if column[0] in SUMMARY]
    lines = [[text(row, rows) for _, text in columns] for row in rows]
    return markdown_table([name for name, _ in columns], lines)


def rate_table(cells: Sequence[Result]) -> str:
    """Validation RMSE×100 of the cells that chose the rates."""
    shown = [cell for cell in cells if not cell["ablation"]]
    rates = sorted({cell["rate"] for cell in shown})
    by_method: dict[tuple[str, str], dict[float, float]] = {}
    for cell in shown:
        errors = by_method.setdefault((cell["shape"], cell["title"]), {})
        errors.setdefault(cell["rate"], 100 * final_error(cell))
    lines = [
        [shape, title, *(_error(errors[rate]) if rate in errors else "" for rate in rates)]
        for (shape, title), errors in by_method.items()
        if len(errors) > 1
    ]
    return markdown_table(["code maps", "method", *(f"{rate:g}" for rate in rates)], lines)


def ablation_table(cells: Sequence[Result]) -> str:
    """What changes when one setting does; the first row of a shape is the default."""
    rows = rows_of(cells)
    names = ("code maps", "changed", "RMSE×100", "change, %", "mixture RMSE×100", "perplexity")
    lines = []
    for shape in dict.fromkeys(cell["shape"] for cell in cells if cell["ablation"]):
        default = next(
            row
            for row in rows
            if (row.first["shape"], row.first["method"]) == (shape, "stochastic")
        )
        changed = [
            Row([cell])
            for cell in cells
            if cell["shape"] == shape and cell["ablation"] and final_error(cell) < math.inf
        ]
        reference = default.cells[0]["test"]["RMSE"]
        for row in (Row(default.cells[:1]), *changed):
            error = row.first["test"]["RMSE"]
            lines.append(
                [
                    shape,
                    row.first["ablation"] or "(default)",
                    row.spread(),
                    f"{100 * (error / reference - 1):+.1f}",
                    _number("mixture_RMSE", 2, 100)(row, rows),
                    _list("perplexity", 0)(row, rows),
                ]
            )
    return markdown_table(names, lines)


def _error(value: float) -> str:
    return f"{value:.2f}" if value < math.inf else "diverged"
