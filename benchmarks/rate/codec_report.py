"""The table of files and the pictures at equal bytes."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.rate.curves import Point, ratio_at_equal_error
from benchmarks.rate.files import FORMATS, to_picture, within
from benchmarks.rate.report import PAGE
from benchmarks.readme import markdown_table, replace_section

Result = dict[str, Any]
NUM_PIXELS = 128**2
MARGIN = 14


def write_report(
    results: Sequence[Result],
    images: Mapping[str, UInt8[Tensor, "batch 3 height width"]],
    folder: Path,
    path: Path,
    budget: str,
) -> None:
    """The pictures of each set, and the section of the page if it has one of this budget."""
    for name, originals in images.items():
        sheets = [
            sheet(result, originals, folder / result["codec"] / f"{name}.png")
            for result in results
            if result["images"] == name and (folder / result["codec"] / f"{name}.png").exists()
        ]
        if sheets:
            sheets[0].save(path.with_name(f"{path.stem}_{name}.png"), optimize=True)
    if f"<!-- rate-codecs-{budget} -->" in PAGE.read_text():
        text = f"{table(results)}\n\n{time_table(results)}"
        replace_section(f"rate-codecs-{budget}", text, PAGE)


def table(results: Sequence[Result]) -> str:
    """Ours over others, at equal PSNR and at equal MS-SSIM."""
    header = ["pictures", "tokenizer", "codes", "bytes", "of them header", "bits/pixel"]
    header += ["PSNR", "MS-SSIM"]
    for measure in ("PSNR", "MS-SSIM"):
        header += [f"{codec}, {measure}" for codec in FORMATS]
    lines = []
    for result in results:
        if result["codec"] in FORMATS:
            continue
        others = {own["codec"]: own for own in results if own["images"] == result["images"]}
        for point in result["points"]:
            quality = point["quality"]
            line = [result["images"], result["codec"]]
            line += [f"search, μ {quality:g}" if quality else "greedy"]
            line += [f"{point['bytes']:.0f}", f"{point['header_bytes']:.0f}"]
            line += [f"{8 * point['bytes'] / NUM_PIXELS:.3f}"]
            line += [f"{point['PSNR']:.2f}", f"{point['MS-SSIM']:.4f}"]
            for measure in ("PSNR", "MS-SSIM"):
                line += [ratios(point, others.get(codec), measure) for codec in FORMATS]
            lines.append(line)
    return markdown_table(header, lines)


def ratios(point: Result, other: Result | None, measure: str) -> str:
    """Bytes over another codec's: of whole files, then without headers."""
    shown = []
    for has_header in (True, False):
        curve = [point_of(own, measure, has_header) for own in other["points"]] if other else []
        ratio = ratio_at_equal_error(point_of(point, measure, has_header), curve)
        if ratio is None:
            return ""
        shown.append(f"{ratio.value:.2f}" + ("*" if ratio.is_extrapolated else ""))
    return " / ".join(shown)


def point_of(point: Result, measure: str, has_header: bool) -> Point:
    """Of a curve: mean PSNR as an error, or 1 - MS-SSIM, and bits."""
    psnr = float(point["PSNR"])
    error = 10 ** (-psnr / 20) if measure == "PSNR" else 1 - float(point["MS-SSIM"])
    num_bytes = point["bytes"] - (0 if has_header else point["header_bytes"])
    return Point(error, 8 * num_bytes)


def time_table(results: Sequence[Result]) -> str:
    """Processor seconds for a picture, means over the qualities."""
    header = ["pictures", "codec", "options", "header, bytes", "encoding, s", "decoding, s"]
    lines = []
    for result in results:
        points = result["points"]
        form = FORMATS.get(result["codec"])
        options = [f"{name} {value}" for name, value in form.options.items()] if form else []
        times = [
            statistics.mean(point[f"{way}_seconds"] for point in points)
            for way in ("encoding", "decoding")
        ]
        mean_header = statistics.mean(point["header_bytes"] for point in points)
        line = [result["images"], result["codec"], ", ".join(options), f"{mean_header:.0f}"]
        lines.append([*line, *(f"{seconds:.4f}" for seconds in times)])
    return markdown_table(header, lines)


def sheet(
    result: Result, originals: UInt8[Tensor, "batch 3 height width"], decoded: Path
) -> Image.Image:
    """A row for each codec, in files of as many bytes as ours, or the smallest it can write."""
    strip = Image.open(decoded).convert("RGB")
    limits = result["points"][-1]["shown_bytes"]
    side = originals.shape[-1]
    ours = [strip.crop((side * n, 0, side * (n + 1), side)) for n in range(len(limits))]
    rows = {"original": [(to_picture(image), 0) for image in originals[: len(limits)]]}
    rows["ours"] = [*zip(ours, limits, strict=True)]
    for codec, form in FORMATS.items():
        pairs = zip(originals, limits, strict=False)
        rows[codec] = [within(image, form, limit) for image, limit in pairs]
    canvas = Image.new("RGB", (side * len(limits), (side + MARGIN) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (name, row) in enumerate(rows.items()):
        top = number * (side + MARGIN)
        for column, (picture, num_bytes) in enumerate(row):
            label = f"{name}, {num_bytes} bytes" if num_bytes else name
            draw.text((column * side + 2, top + 1), label, fill="black")
            canvas.paste(picture.convert("RGB"), (column * side, top + MARGIN))
    return canvas
