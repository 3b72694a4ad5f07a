"""The JSON of all cells, and the table and the plot that are made from it."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.rate.cells import Cell
from benchmarks.rate.curves import Point, Ratio, bd_rate, ratio_at_equal_error
from benchmarks.readme import README, markdown_table, replace_section
from tokenizer.storage.files import replace_file

mpl.use("agg")

RESULTS = Path(__file__).parents[1] / "results"
PAGE = README.parent / "benchmarks" / "README.md"
Result = dict[str, Any]


class Setting(NamedTuple):
    """What is the same over seeds: a row of the table."""

    shape: str
    is_stochastic: bool
    has_prior: bool
    encoding: str
    rate_weight: float


class Row(NamedTuple):
    """One way to choose the codes of one tokenizer."""

    cell: Result
    numbers: Result

    @property
    def setting(self) -> Setting:
        """Of all seeds."""
        cell, numbers = self.cell, self.numbers
        return Setting(
            cell["shape"],
            cell["is_stochastic"],
            cell["has_prior"],
            numbers["encoding"],
            numbers["rate_weight"],
        )

    @property
    def maps(self) -> str:
        """Code maps without K: rows of one curve have these in common."""
        return str(self.cell["shape"]).rpartition("-k")[0]

    @property
    def point(self) -> Point:
        """Of a curve."""
        return Point(self.numbers["RMSE"], self.numbers["bits"])


def gathered(folder: Path, path: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """Results by cell: those in the JSON at `path`, and those that have finished in `folder`."""
    results = {row["cell"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for cell in cells:
        result = folder / cell.name / "result.json"
        if result.exists():
            results[cell.name] = json.loads(result.read_text())
    return results


def write_report(results: dict[str, Result], path: Path, budget: str) -> None:
    """Writes JSON and plot, and the section of the page if it has one of this budget."""
    lines = ",\n".join(json.dumps(results[name]) for name in sorted(results))
    replace_file(path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))
    rows = rows_of(results)
    curves(rows).savefig(path.with_name(f"{path.stem}_curves.png"))
    if f"<!-- rate-{budget} -->" in PAGE.read_text():
        text = f"{table(rows)}\n\n{curve_table(rows)}"
        replace_section(f"rate-{budget}", text, PAGE)


def rows_of(results: dict[str, Result]) -> list[Row]:
    """All rows of all cells: code maps from few bits to many, ours first."""
    rows = [Row(cell, numbers) for cell in results.values() for numbers in cell["rows"]]
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[object, ...]:
    cell, numbers = row.cell, row.numbers
    is_plain = not cell["has_prior"]
    method = (not cell["is_stochastic"], is_plain, numbers["encoding"], numbers["rate_weight"])
    return (row.cell["nominal_bits"], row.cell["shape"], *method, cell["seed"])


def against_greedy(row: Row, rows: Sequence[Row]) -> Ratio | None:
    """Bits at equal RMSE over those of the fair baseline, encoded greedily, prior fitted after."""
    return ratio_at_equal_error(row.point, _baseline(row, rows, _is_greedy))


def against_search(row: Row, rows: Sequence[Row]) -> Ratio | None:
    """Over those of the fair baseline with the same kind of search, all its μ and both priors."""
    return ratio_at_equal_error(row.point, _baseline(row, rows, _is_searched))


def _is_greedy(row: Row) -> bool:
    return row.numbers["encoding"] == "greedy" and not row.cell["has_prior"]


def _is_searched(row: Row) -> bool:
    return bool(row.numbers["encoding"] == "search")


def _baseline(row: Row, rows: Sequence[Row], accepts: Callable[[Row], bool]) -> list[Point]:
    """Points of the baseline at the same code maps, of all K: of the same seed, or of the first."""
    own = [
        other
        for other in rows
        if other.maps == row.maps and not other.cell["is_stochastic"] and accepts(other)
    ]
    seeds = {other.cell["seed"] for other in own}
    seed = row.cell["seed"] if row.cell["seed"] in seeds else min(seeds, default=0)
    return [other.point for other in own if other.cell["seed"] == seed]


def table(rows: Sequence[Row]) -> str:
    """A line per setting, with means over the seeds."""
    header = ["code maps", "method", "prior", "codes", "seeds", "RMSE×100", "PSNR", "bits"]
    header += ["against greedy", "against the same search", "nominal", "perplexity", "of K, %"]
    header += ["s/image"]
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        lines.append(_line(setting, own, rows))
    return markdown_table(header, lines)


def _line(setting: Setting, own: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.mean(float(row.numbers[name]) for row in own)

    layers = [
        statistics.mean(values)
        for values in zip(*(row.numbers["perplexity"] for row in own), strict=True)
    ]
    size = own[0].cell["codebook_size"]
    return [
        setting.shape,
        "ours" if setting.is_stochastic else "fair",
        "in training" if setting.has_prior else "fitted after",
        setting.encoding + (f", μ {setting.rate_weight:g}" if setting.rate_weight else ""),
        str(len(own)),
        f"{100 * mean('RMSE'):.2f}",
        f"{mean('PSNR'):.2f}",
        f"{mean('bits'):.0f}",
        _ratios([against_greedy(row, rows) for row in own]),
        _ratios([against_search(row, rows) for row in own]),
        f"{own[0].cell['nominal_bits']:.0f}",
        ", ".join(f"{value:.0f}" for value in layers),
        ", ".join(f"{100 * value / size:.0f}" for value in layers),
        f"{mean('encoding_seconds'):.3f}",
    ]


def _ratios(ratios: Sequence[Ratio | None]) -> str:
    """Their mean, with the extremes of several, and a mark where a curve had to go on."""
    values = [ratio.value for ratio in ratios if ratio is not None]
    if len(values) < len(ratios):
        return ""
    mark = "*" if any(ratio is not None and ratio.is_extrapolated for ratio in ratios) else ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{mark}{spread}"


Kind = tuple[bool, bool, str]
"""Ours, with a prior in training, how codes are chosen."""


def curve_points(rows: Sequence[Row], maps: str, kind: Kind) -> list[Point]:
    """Of all K and μ, means over the seeds."""
    settings: dict[Setting, list[Point]] = {}
    for row in rows:
        setting = row.setting
        if row.maps == maps and (*setting[1:3], setting.encoding) == kind:
            settings.setdefault(setting, []).append(row.point)
    return [
        Point(*(statistics.mean(values) for values in zip(*points, strict=True)))
        for points in settings.values()
    ]


def curve_table(rows: Sequence[Row]) -> str:
    """BD-rates of the curves of each code map, all K and μ."""
    header = ["code maps", "method", "prior", "codes", "BD-rate against greedy, %"]
    header += ["BD-rate against the same search, %"]
    lines = []
    for maps in dict.fromkeys(row.maps for row in rows):
        greedy = curve_points(rows, maps, (False, False, "greedy"))
        searched = [
            point
            for has_prior in (True, False)
            for point in curve_points(rows, maps, (False, has_prior, "search"))
        ]
        for kind in kinds(rows, maps):
            points = curve_points(rows, maps, kind)
            changes = [bd_rate(points, greedy), bd_rate(points, searched)]
            if changes == [None, None]:
                continue
            method = ["ours" if kind[0] else "fair", "in training" if kind[1] else "fitted after"]
            shown = ["" if own is None else f"{100 * own:+.1f}" for own in changes]
            lines.append([maps, *method, kind[2], *shown])
    return markdown_table(header, lines)


def kinds(rows: Sequence[Row], maps: str) -> list[Kind]:
    """Curves of these code maps."""
    settings = [row.setting for row in rows if row.maps == maps]
    return [*dict.fromkeys((*setting[1:3], setting.encoding) for setting in settings)]


def curves(rows: Sequence[Row]) -> Figure:
    """Bits under the prior over RMSE, a panel for each code map."""
    names = [*dict.fromkeys(row.maps for row in rows)]
    figure = Figure((4.6 * len(names), 4.2), layout="constrained", dpi=150)
    for place, maps in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for is_stochastic, has_prior, encoding in kinds(rows, maps):
            points = sorted(curve_points(rows, maps, (is_stochastic, has_prior, encoding)))
            label = "ours" if is_stochastic else "fair baseline"
            label += ", prior in training" if has_prior else ""
            axes.plot(
                [point.bits for point in points],
                [100 * point.error for point in points],
                marker="o" if encoding == "search" else "s",
                linestyle="-" if encoding == "search" else ":",
                color=("tab:blue" if has_prior else "tab:cyan")
                if is_stochastic
                else ("tab:red" if has_prior else "tab:orange"),
                label=f"{label}, {encoding}",
            )
        axes.set(title=maps, xlabel="bits under the prior", ylabel="RMSE×100")
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.tick_params(axis="x", which="both", labelrotation=45)
    figure.axes[0].legend(fontsize="x-small")
    return figure
