"""Pictures: grids of images, curves of a run, use of the codebooks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from pipelines.run_log import read_metrics

mpl.use("agg")

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name for images by their number of channels."""


def to_pil(image: UInt8[Tensor, "channels height width"]) -> Image.Image:
    """One image."""
    channels, height, width = image.shape
    values = image.movedim(0, -1).contiguous().numpy()
    return Image.frombytes(MODES[channels], (width, height), values.tobytes())


def image_grid(
    images: UInt8[Tensor, "batch channels height width"], columns: int, scale: int | None = None
) -> Image.Image:
    """Images row by row, small ones enlarged without smoothing."""
    tiled = make_grid(images, columns, padding=2, pad_value=255)[: images.shape[1]]
    picture = to_pil(tiled)
    factor = scale or max(1, 64 // images.shape[-1])
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def comparison(
    originals: UInt8[Tensor, "batch channels height width"],
    reconstructions: UInt8[Tensor, "batch channels height width"],
) -> Image.Image:
    """Pairs side by side, four to a row: an original, then its reconstruction."""
    return image_grid(torch.stack([originals, reconstructions], 1).flatten(0, 1), 8)


def curves(folder: Path, panels: Mapping[str, Sequence[str]]) -> Figure:
    """Metrics of a run over its steps.

    Args:
        folder: of one stage, with `metrics.jsonl`.
        panels: by phase ("train", "validation"), the metrics to show, a panel each. A list-valued
            metric gets a line per layer.
    """
    chosen = [(phase, name) for phase, names in panels.items() for name in names]
    by_phase = {phase: read_metrics(folder, phase) for phase in panels}
    shown = [(phase, name) for phase, name in chosen if name in by_phase[phase]]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure((4 * columns, 2.6 * rows), layout="constrained")
    for number, (phase, name) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, number)
        steps, values = by_phase[phase][name]
        if isinstance(values[0], list):
            for layer in range(len(values[0])):
                axes.plot(steps, [entry[layer] for entry in values], label=f"layer {layer + 1}")
            axes.legend(fontsize="small")
        else:
            axes.plot(steps, values)
        axes.set_title(f"{name} ({phase})", fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def usage_chart(counts: Sequence[Tensor]) -> Figure:
    """How often each code is used, codes of a layer sorted by use, a panel per layer."""
    columns = min(len(counts), 4)
    rows = -(-len(counts) // columns)
    figure = Figure((3 * columns, 2.2 * rows), layout="constrained")
    for layer, count in enumerate(counts, 1):
        axes = figure.add_subplot(rows, columns, layer)
        share = (count.double() / count.sum()).sort(descending=True).values
        axes.fill_between(range(len(share)), share.numpy(), step="mid")
        axes.axhline(1 / len(share), color="black", linewidth=0.8, linestyle="--")
        axes.set_title(
            f"layer {layer}: {int((count > 0).sum())} of {len(count)}", fontsize="medium"
        )
        axes.set_xlabel("code, by rank")
        axes.set_ylabel("share")
    return figure
