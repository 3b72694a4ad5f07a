"""How unusual the images of a folder are to a run: `score.html`, CSV, JSON, pictures."""

import csv
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipelines.evaluation.anomaly import (
    SCORES,
    AnomalyScorer,
    Measurements,
    shares_above,
)
from pipelines.images import image_grid
from pipelines.report.page import TEMPLATES, PngImage, columns_of, write_image
from tokenizer.storage.files import replace_file

QUANTILE = 0.95
"""Of the reference images; what lies above is counted."""
MOST_LISTED = 20
LARGEST_SHARE = 0.99
"""Of the positions that are shown: the others are as light as the lightest of these."""


class ScoredFolder(NamedTuple):
    """Images with all that was found of them."""

    names: Sequence[str]
    images: UInt8[Tensor, "images channels height width"]
    measured: Measurements
    scores: Mapping[str, Tensor]


def write_scores(
    scored: ScoredFolder, scorer: AnomalyScorer, folder: Path, metadata: Mapping[str, Any]
) -> None:
    """Writes `scores.csv`, `scores.json`, `score.html` and PNG files into `folder`.

    Args:
        scored: at least one image.
        scorer: that has scored them.
        folder: made if need be.
        metadata: of the run and its images, for the JSON file and the page.
    """
    reference = scorer.scores(scorer.reference)
    above = shares_above(scored.scores, reference, QUANTILE)
    facts = {
        **metadata,
        "num_images": len(scored.names),
        "priors": list(scored.measured.bits),
        "decoder_variance": scorer.decoder_variance,
        "scores": [
            {
                "name": name,
                "what": what,
                "mean": scored.scores[name].mean().item(),
                "reference_mean": reference[name].mean().item(),
                "reference_95": reference[name].quantile(QUANTILE).item(),
                "share_above": above[name],
            }
            for name, what in SCORES.items()
        ],
        "bits": {
            name: {
                "mean": bits.mean(0).tolist(),
                "reference_mean": scorer.reference.bits[name].mean(0).tolist(),
            }
            for name, bits in scored.measured.bits.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = TEMPLATES.get_template("score.html.jinja").render(
        title=f"Unusual images to {metadata['run']}",
        facts=facts,
        quantile=QUANTILE,
        sections={name: _pictures(scored, scorer, name, folder) for name in SCORES},
        listed=_listed(scored),
        most_listed=min(MOST_LISTED, len(scored.names)),
    )
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(rows_of(scored))
    contents = {"scores.csv": table.getvalue(), "scores.json": text, "score.html": page}
    for name, content in contents.items():
        data = content.encode(errors="surrogateescape" if name == "scores.csv" else "strict")
        replace_file(folder / name, functools.partial(Path.write_bytes, data=data))


def rows_of(scored: ScoredFolder) -> list[list[str]]:
    """The CSV's rows, the header first: bits of each layer, what was measured, scores."""
    columns: dict[str, Tensor] = {}
    for prior, bits in scored.measured.bits.items():
        for layer, values in enumerate(bits.unbind(1), 1):
            columns[f"{prior}_bits_layer_{layer}"] = values
    columns["png_bits_per_dim"] = scored.measured.png_bits_per_dim
    columns |= scored.scores
    table = torch.stack([*columns.values()], 1).tolist()
    rows = (
        [name, *(f"{value:.6g}" for value in row)]
        for name, row in zip(scored.names, table, strict=True)
    )
    return [["file", *columns], *rows]


def _listed(scored: ScoredFolder) -> list[list[str]]:
    order = scored.scores["joint"].argsort(descending=True, stable=True)[:MOST_LISTED].tolist()
    return [
        [scored.names[item], *(f"{scored.scores[name][item].item():.4g}" for name in SCORES)]
        for item in order
    ]


def _pictures(
    scored: ScoredFolder, scorer: AnomalyScorer, name: str, folder: Path
) -> tuple[PngImage, list[str]]:
    """The images with the highest and with the lowest score, and where their codes surprise."""
    size = scored.images.shape[-1]
    order = scored.scores[name].argsort(descending=True, stable=True)
    columns = min(columns_of(size), len(order))
    rows, labels = [], []
    for which, items in (("highest", order[:columns]), ("lowest", order.flip(0)[:columns])):
        images = scored.images[items]
        rows += [_colors(images), heat_maps(images, scorer.surprise(images))]
        labels += [which, "its bits"]
    grid = image_grid(torch.cat(rows), columns)
    return write_image(folder / f"{name}.png", grid, f"images by {name}", size), labels


def heat_maps(
    images: UInt8[Tensor, "images channels height width"],
    surprise: Float[Tensor, "images height width"],
) -> UInt8[Tensor, "images 3 height width"]:
    """Where the codes cost most bits, over the dimmed images: black none, light the most."""
    largest = surprise.flatten().quantile(LARGEST_SHARE).clamp_min(1e-9)
    shares = (surprise / largest).clamp(0, 1)
    colors = torch.from_numpy(mpl.colormaps["inferno"](shares.numpy())[..., :3]).movedim(-1, 1)
    gray = _colors(images).double().mean(1, keepdim=True) / 255
    return (255 * (0.75 * colors + 0.25 * gray)).round().to(torch.uint8)


def _colors(
    images: UInt8[Tensor, "images channels height width"],
) -> UInt8[Tensor, "images 3 height width"]:
    """Three channels of any number; alpha is left out."""
    return images[:, :3] if images.shape[1] > 2 else images[:, :1].expand(-1, 3, -1, -1)
