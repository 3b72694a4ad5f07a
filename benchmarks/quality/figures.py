"""Pictures of the comparison: rate and distortion, code use, self-annealing, what codes draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from benchmarks.quality.run_cell import test_data
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.data.sources import load_images
from pipelines.images import image_grid, to_float, to_uint8
from pipelines.run.folder import load_run
from tokenizer import Tokenizer

mpl.use("agg")

RESULTS = Path(__file__).parents[1] / "results"

MARKERS = {"stochastic": "o", "nearest": "s", "plain": "x", "shared": "D"}
COLORS = {
    "stochastic": "tab:blue",
    "nearest": "tab:orange",
    "plain": "tab:red",
    "shared": "tab:brown",
    "residualvq": "tab:green",
    "fsq": "tab:purple",
    "simvq": "tab:pink",
    "lfq": "tab:gray",
}
LABELS = {
    "stochastic": "HQ-VAE family (ours)",
    "nearest": "VQ-VAE family, fair",
    "plain": "VQ-VAE family, plain",
    "shared": "RQ-VAE, shared codebook",
    "residualvq": "ResidualVQ",
    "fsq": "FSQ",
    "simvq": "SimVQ",
    "lfq": "LFQ",
}
NUM_PROGRESSIVE = 8
NUM_COARSE_CODES = 64


def write_figures(folder: Path, rows: Sequence[Any], budget: str) -> None:
    """All pictures of a budget, from the results and from the models that are left in `folder`."""
    ours = [row.first for row in rows if row.first["method"] == "stochastic"]
    figures = {"rate_distortion": rate_distortion(rows)}
    if any(row.first["family"] == "RSQ-VAE" for row in rows):
        figures["perplexity"] = perplexity_by_layer(rows)
    several_layers = [cell for cell in ours if len(cell["test"]["perplexity"]) > 1]
    if several_layers:
        figures["annealing"] = annealing(several_layers[:4])
    for name, figure in figures.items():
        figure.savefig(RESULTS / f"quality_{budget}_{name}.png")
    # Of each family the one with the lowest error.
    best = {cell["family"]: cell for cell in sorted(several_layers, key=_error, reverse=True)}
    for family, cell in best.items():
        if not (folder / cell["cell"] / "tokenizer").exists():  # trained on another machine
            continue
        run = load_run(TokenizerRunConfig, folder / cell["cell"] / "tokenizer" / "config.json")
        tokenizer = Tokenizer.from_pretrained(folder / cell["cell"] / "tokenizer" / "model")
        pictures = {
            "progressive": progressive(tokenizer, load_images(test_data(run.data), "validation")),
            "codes": codebook_picture(tokenizer, run.data.image_size),
        }
        for name, picture in pictures.items():
            path = RESULTS / f"quality_{budget}_{name}_{family}.png"
            picture.save(path, optimize=True)


def _error(cell: Mapping[str, Any]) -> float:
    error: float = cell["test"]["RMSE"]
    return error


def rate_distortion(rows: Sequence[Any]) -> Figure:
    """RMSE over bits per image, nominal and entropy-coded, side by side."""
    figure = Figure((9, 3.6), layout="constrained", dpi=150)
    for place, (name, title) in enumerate(
        (("nominal_bits", "nominal bits"), ("marginal_bits", "entropy-coded bits (marginal)")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for method in dict.fromkeys(row.first["method"] for row in rows):
            own = [row for row in rows if row.first["method"] == method]
            bits = [row.value(name) for row in own]
            errors = [100 * row.value("RMSE") for row in own]
            style: dict[str, Any] = {"linestyle": "none", "markersize": 5, "alpha": 0.8}
            axes.plot(bits, errors, label=LABELS[method], **style, **_style(method))
        axes.set(xlabel=f"{title} per image", ylabel="RMSE×100", xscale="log", yscale="log")
        _plain_ticks(axes)
        if place == 2:
            axes.legend(fontsize=7, edgecolor="none")
    return figure


def perplexity_by_layer(rows: Sequence[Any]) -> Figure:
    """Perplexity over K, layer by layer, of the residual models."""
    shapes = [row.first["shape"] for row in rows if row.first["family"] == "RSQ-VAE"]
    names = list(dict.fromkeys(shapes))
    figure = Figure((3 * len(names), 3.1), layout="constrained", dpi=150)
    lines: dict[str, Any] = {}
    for place, shape in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        for row in rows:
            if row.first["shape"] == shape:
                values = row.layers("perplexity")
                size = int(shape.rpartition("k")[2])
                layers, shares = range(1, len(values) + 1), [value / size for value in values]
                method = row.first["method"]
                (lines[LABELS[method]],) = axes.plot(layers, shares, **_style(method))
        axes.set(title=shape, xlabel="layer", ylabel="perplexity / K", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style: dict[str, Any] = {"ncols": len(lines), "fontsize": 7, "edgecolor": "none"}
    figure.legend([*lines.values()], [*lines], loc="outside lower center", **style)
    return figure


def annealing(cells: Sequence[Any]) -> Figure:
    """s² and the mean posterior entropy of each layer over training."""
    figure = Figure((4 * len(cells), 4.6), layout="constrained", dpi=150)
    for column, cell in enumerate(cells, 1):
        maps = cell["shape"].split()[-1].rpartition("-k")[0].split("+")
        sides = [int(entry.split("x")[0]) for entry in maps]
        depths = [int((*entry.split("x"), "1")[2]) for entry in maps]
        positions = [
            side**2 for side, depth in zip(sides, depths, strict=True) for _ in range(depth)
        ]
        for line, (name, title) in enumerate(
            (("dequantization_variance", "s²"), ("layer_entropy", "posterior entropy, nats"))
        ):
            axes = figure.add_subplot(2, len(cells), column + line * len(cells))
            steps, values = cell["training"][name]
            for layer in range(len(positions)):
                scale = positions[layer] if name == "layer_entropy" else 1
                curve = [entry[layer] / scale for entry in values]
                axes.plot(steps, curve, label=f"layer {layer + 1}")
            axes.set(title=f"{cell['title']}, {cell['shape']}" if not line else "", ylabel=title)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
            if name == "dequantization_variance":
                axes.set_yscale("log")
                axes.legend(fontsize=6, edgecolor="none")
    return figure


def progressive(tokenizer: Tokenizer, dataset: ImageDataset) -> Any:
    """A row per image: from the first 1, 2, … layers, then the original."""
    items = np.linspace(0, len(dataset) - 1, NUM_PROGRESSIVE).astype(np.int64)
    images = dataset.images_at(items)
    indices = tokenizer.encode(to_float(images))
    layers = range(1, len(tokenizer.codebook_sizes) + 1)
    columns = [to_uint8(tokenizer.decode(indices, num_layers=layer)) for layer in layers]
    return image_grid(torch.stack([*columns, images], 1).flatten(0, 1), len(columns) + 1)


def codebook_picture(tokenizer: Tokenizer, size: int) -> Any:
    """What each of the coarsest codes draws when it fills its whole map, alone."""
    maps = tokenizer.code_maps(size, size)
    count = min(maps[0].codebook_sizes[0], NUM_COARSE_CODES)
    indices = [
        torch.zeros(count, own.depth, own.height, own.width, dtype=torch.int64) for own in maps
    ]
    indices[0][:, 0] = torch.arange(count).view(-1, 1, 1)
    return image_grid(to_uint8(tokenizer.decode(indices, num_layers=1)), 16)


def _style(method: str) -> dict[str, Any]:
    return {"marker": MARKERS.get(method, "^"), "color": COLORS[method]}


def _plain_ticks(axes: Any) -> None:
    axes.grid(alpha=0.25, which="both")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=7)
