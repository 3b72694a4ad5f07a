"""What pages about runs share: the templates' environment, and images inside and beside a page."""

import base64
import functools
import io
import re
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from tokenizer.storage.files import replace_file

ROW_WIDTH = 860
"""Pixels on the page for a row of images."""
CHART_WIDTH_PER_INCH = 82.0
"""CSS pixels: a full row of panels then fills the page."""
SMALL = 96
"""Images up to this side stay sharp-edged where a browser scales them."""


class PngImage(NamedTuple):
    """An image of the page."""

    data: str
    """Base64."""
    alt: str
    width: int | None = None
    """In CSS pixels; None takes that of the image."""
    is_small: bool = False


def printable(value: object) -> object:
    """Text in which what UTF-8 or HTML cannot hold has become a replacement character."""
    if isinstance(value, Markup):  # of a macro, whose values went through here
        return value
    return re.sub(
        "[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value)
    )


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=printable,
    undefined=StrictUndefined,
)
"""Whatever text they are given, they escape."""


def write_image(path: Path, image: Image.Image, alt: str, size: int) -> PngImage:
    """Writes a grid of images with side `size`, and gives the same bytes for the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return PngImage(_write(path, buffer), alt, is_small=size <= SMALL)


def write_chart(path: Path, figure: Figure, alt: str) -> PngImage:
    """Writes a chart, and gives the same bytes for the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return PngImage(_write(path, buffer), alt, round(CHART_WIDTH_PER_INCH * figure.get_figwidth()))


def _write(path: Path, buffer: io.BytesIO) -> str:
    data = buffer.getvalue()
    replace_file(path, functools.partial(Path.write_bytes, data=data))
    return base64.b64encode(data).decode()


def columns_of(size: int) -> int:
    """Images that fit into a row, at the scale that `image_grid` takes."""
    cell = (size + 2) * max(1, 64 // size)
    return min(max(ROW_WIDTH // cell, 4), 12)
