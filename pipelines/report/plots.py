"""Charts: curves of a run, use of the codebooks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pipelines.evaluation.robustness import Robustness
from pipelines.run.log import read_metrics
from tokenizer.storage.errors import InputError

mpl.use("agg")

COLORS = {"train": "tab:blue", "validation": "tab:orange"}
LOGARITHMIC = {"temperature", "dequantization_variance"}
"""Metrics that change by orders of magnitude."""
MOST_MARKED = 24
"""Points of a curve up to which each is marked."""
DPI = 150

PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "tokenizer": {
        "train": (
            "loss",
            "reconstruction",
            "quantization_error",
            "posterior_entropy",
            "commitment",
            "rmse",
            "temperature",
            "dequantization_variance",
            "layer_entropy",
        ),
        "validation": ("RMSE", "PSNR", "perplexity", "codebook_usage"),
    },
    "decoder": {
        "train": ("loss", "reconstruction", "perceptual", "adversarial", "rmse"),
        "validation": ("RMSE", "PSNR", "discriminator_right_fake"),
    },
    "prior": {"train": ("loss", "nats_per_layer"), "validation": ("bits_per_image",)},
}
"""What is shown of each stage, by phase."""


def curves(folder: Path, panels: Mapping[str, Sequence[str]]) -> Figure:
    """Metrics of a run over its steps.

    Args:
        folder: of one stage, with `metrics.jsonl`.
        panels: by phase ("train", "validation"), the metrics to show, a panel each; those that
            the run did not log, or only as zeros or empty lists because its quantizer has no such
            term, are left out. A list-valued metric gets a line per layer.

    Raises:
        InputError: the run logged none of them.
    """
    by_phase: dict[str, dict[str, Any]] = {
        # Beside a discriminator, the tokenizer's have its name before them.
        phase: {
            name.removeprefix("tokenizer/"): line
            for name, line in read_metrics(folder, phase).items()
        }
        for phase in panels
    }
    shown = [
        (phase, name)
        for phase, names in panels.items()
        for name in names
        if name in by_phase[phase] and any(map(np.any, by_phase[phase][name][1]))
    ]
    if not shown:
        raise InputError(f"{folder / 'metrics.jsonl'} holds none of the metrics to show")
    figure, places = _panels(len(shown))
    for axes, (phase, name) in zip(places, shown, strict=True):
        steps, values = by_phase[phase][name]
        # Few points would hide in a line, and one point has none.
        marker = "." if len(steps) <= MOST_MARKED else ""
        if isinstance(values[0], list):
            colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(values[0])))
            for layer, color in enumerate(colors):
                line = [entry[layer] for entry in values]
                axes.plot(steps, line, marker=marker, color=color, label=f"layer {layer + 1}")
            axes.legend(fontsize=7, edgecolor="none", handlelength=1)
        else:
            axes.plot(steps, values, marker=marker, color=COLORS[phase])
        if name in LOGARITHMIC:
            axes.set_yscale("log")
        axes.set_title(f"{name.replace('_', ' ')} ({phase})", fontsize=9, loc="left")
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.02 * steps[-1])
    return figure


def usage_chart(counts: Sequence[Tensor]) -> Figure:
    """How often each code is used, codes of a layer sorted by use, a panel per layer."""
    figure, places = _panels(len(counts))
    for layer, (axes, count) in enumerate(zip(places, counts, strict=True), 1):
        share = (count.double() / count.sum()).sort(descending=True).values
        axes.stairs(share.numpy(), fill=True, color=COLORS["train"], alpha=0.8)
        axes.axhline(1 / len(share), color="black", linewidth=0.8, linestyle="--")
        axes.set_title(
            f"layer {layer}: {int((count > 0).sum())} of {len(count)} codes",
            fontsize=9,
            loc="left",
        )
        axes.set_xlabel("code, by rank")
        axes.set_ylabel("share")
        axes.margins(x=0)
    return figure


def robustness_chart(results: Sequence[tuple[str, Sequence[Robustness]]]) -> Figure:
    """Share of codes that each change keeps, mean over layers, bars side by side for each run."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08)
    figure = Figure((12, 2.8), layout=layout, dpi=DPI)
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    for number, ((name, rows), color) in enumerate(zip(results, COLORS.values(), strict=False)):
        places = np.arange(len(rows)) + (number + 0.5) * width - 0.4
        kept = [float(np.mean(row.kept)) for row in rows]
        bars = axes.bar(places, kept, width, label=_plain(name), color=color, alpha=0.8)
        axes.bar_label(bars, [f"{share:.0%}" for share in kept], fontsize=7)
        axes.set_xticks(range(len(rows)), [row.change for row in rows], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("codes kept, mean over layers", fontsize=8)
    if len(results) > 1:
        axes.legend(fontsize=8, edgecolor="none", loc="upper right")
    return figure


def _plain(name: str) -> str:
    """Text that matplotlib takes as it is: no formula, no entry that a legend leaves out."""
    return " " + "".join(one for one in name if one.isprintable()).replace("$", r"\$")


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """Panels in rows of four, each of the same size whatever their number."""
    columns = min(count, 4)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08)
    figure = Figure((3 * columns, 2.1 * rows), layout=layout, dpi=DPI)
    places = [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(which="both", labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
    return figure, places
