"""The JSON of all cells, the table and the pictures that are made from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.readme import RESULTS as PAGE
from benchmarks.readme import markdown_table, replace_section
from benchmarks.sharp.cells import Cell

RESULTS = Path(__file__).parents[1] / "results"
JUDGES = ("MobileNetV2", "SqueezeNet")
LOSSES = {
    "squared": "squared error",
    "perceptual": "perceptual",
    "adversarial": "adversarial",
    "both": "both",
}


def write_report(folder: Path, results_folder: Path, budget: str, cells: Sequence[Cell]) -> None:
    """Writes JSON and pictures from what has finished, and the section of the page, if any."""
    path = results_folder / f"sharp_{budget}.json"
    results = {row["cell"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for cell in cells:
        result = folder / cell.name / "result.json"
        if result.exists():
            results[cell.name] = json.loads(result.read_text())
    if not results:
        return
    lines = ",\n".join(json.dumps(results[name]) for name in sorted(results))
    path.write_text(f"[\n{lines}\n]\n")
    for images in dict.fromkeys(cell.images for cell in cells):
        own = [cell for cell in cells if cell.images == images and cell.name in results]
        sheet = _sheet(folder, images, own)
        if sheet is not None:
            sheet.save(results_folder / f"sharp_{budget}_{images}.jpg", quality=92)
    if f"<!-- sharp-{budget} -->" in PAGE.read_text():
        rows = [results[cell.name] for cell in cells if cell.name in results]
        replace_section(f"sharp-{budget}", table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per cell; distances relative to squared error trained alike stand in brackets."""
    header = ["images", "model", "losses", "trained"]
    header += [f"rFD-{judge}" for judge in JUDGES]
    header += ["PSNR", "SSIM", "bits", "perplexity", "grid", "images/s"]
    by_name = {row["cell"]: row for row in rows}
    return markdown_table(header, [_line(row, by_name) for row in rows])


def _line(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> list[str]:
    numbers = row["numbers"]
    base_name = Cell(row["images"], row["is_stochastic"], "squared").name
    base = by_name.get(base_name, {}).get("numbers", {})
    distances = []
    for judge in JUDGES:
        value = numbers.get(f"rFD-{judge}")
        if value is None:
            distances.append("taught it")
            continue
        before = base.get(f"rFD-{judge}")
        ratio = f" (× {value / before:.2f})" if before and row["cell"] != base_name else ""
        distances.append(f"{value:.1f}{ratio}")
    losses = LOSSES[row["losses"]]
    if row["losses"] in ("perceptual", "both"):
        losses += f", {row['teacher']}"
    steps = f"{row['steps']:,} steps"
    return [
        row["images"],
        "ours" if row["is_stochastic"] else "fair baseline",
        losses,
        f"decoder alone, {steps}" if row["is_tuned"] else steps,
        *distances,
        f"{numbers['PSNR']:.2f}",
        f"{numbers['SSIM']:.3f}",
        f"{numbers['nominal_bits']:.0f}",
        ", ".join(f"{value:.0f}" for value in numbers["perplexity"]),
        f"{numbers['grid_energy']:.2f}",
        f"{row['images_per_second']:.0f}",
    ]


def _sheet(folder: Path, images: str, cells: Sequence[Cell]) -> Image.Image | None:
    """The originals above the same pictures of each cell, with its name."""
    originals = folder / f"{images}_originals.png"
    if not originals.exists():
        return None
    rows = [("original", originals)]
    rows += [(cell.name, folder / cell.name / "pictures.png") for cell in cells]
    strips = [(name, Image.open(path).convert("RGB")) for name, path in rows if path.exists()]
    scale = max(1, 512 // strips[0][1].width)
    strips = [
        (n, s.resize((s.width * scale, s.height * scale), Image.Resampling.NEAREST))
        for n, s in strips
    ]
    height = strips[0][1].height + 14
    sheet = Image.new("RGB", (strips[0][1].width, height * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, strip) in enumerate(strips):
        draw.text((2, number * height + 1), name.replace("_", ", "), fill="black")
        sheet.paste(strip, (0, number * height + 14))
    return sheet
