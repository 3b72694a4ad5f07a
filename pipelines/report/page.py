"""Parts of a self-contained HTML page: whatever text they are given, they escape."""

import base64
import functools
import html
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from tokenizer.storage.files import replace_file

CHART_WIDTH_PER_INCH = 82.0
"""CSS pixels: a full row of panels then fills the page."""
SMALL = 96
"""Pictures of images up to this side stay sharp-edged where a browser scales them."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1000px; padding: 44px 24px 80px; background: #fff;
  color: #1f2328; font: 15px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h1, p, td { overflow-wrap: break-word; }
h3 { font-size: 16px; margin: 26px 0 4px; }
h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid #d8dee4; }
p { margin: 4px 0 14px; color: #59636e; max-width: 80ch; }
img { display: block; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin: 24px 0 0; }
.tiles div { background: #f6f8fa; border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: #59636e; font-size: 13px; line-height: 1.35; }
.tiles dd { margin: 2px 0 0; font-size: 18px; font-weight: 600; white-space: nowrap; }
.tiles dd, table { font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; margin: 10px 0 18px; }
th, td { padding: 5px 28px 5px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eaeef2; }
th { font-weight: 500; white-space: nowrap; }
thead th { color: #59636e; font-size: 13px; }
.numbers :is(td, th):not(:first-child) { text-align: right; white-space: nowrap; }
tfoot :is(td, th) { border-bottom: 0; font-weight: 600; }
figure { margin: 12px 0 18px; }
figure.rows { display: grid; grid-template-columns: max-content minmax(0, max-content);
  column-gap: 14px; }
.rows ol { list-style: none; margin: 0; padding: 0; display: grid; grid-auto-rows: 1fr; }
.rows li { display: flex; align-items: center; justify-content: flex-end; min-width: 96px;
  font-size: 13px; }
.rows bdi { max-width: 130px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
details { margin: 8px 0; }
summary { cursor: pointer; color: #0969da; }
pre { background: #f6f8fa; border-radius: 8px; padding: 14px; font-size: 12px; line-height: 1.45;
  max-height: 420px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def escape(value: object) -> str:
    """Text for HTML; what UTF-8 or HTML cannot hold becomes a replacement character."""
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(character) in {"Cc", "Cs"} and character not in "\n\t"
        else character
        for character in str(value)
    )
    return html.escape(shown)


def document(title: str, parts: Sequence[str]) -> bytes:
    """The whole page in UTF-8; it needs no script, no other file and no network."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    ).encode()


def heading(text: str) -> str:
    """Begins a section."""
    return f"<h2>{escape(text)}</h2>\n"


def subheading(text: str) -> str:
    """Begins a part of a section."""
    return f"<h3>{escape(text)}</h3>\n"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>\n"


def tiles(values: Mapping[str, str]) -> str:
    """The few numbers to see first."""
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="tiles">{entries}</dl>\n'


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    total: Sequence[object] = (),
    holds_numbers: bool = False,
) -> str:
    """Rows, each led by its name; numbers are aligned on the right."""

    def row(cells: Sequence[object], tag: str = "td") -> str:
        rest = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[1:])
        return f"<tr><th>{escape(cells[0])}</th>{rest}</tr>"

    head = f"<thead>{row(columns, 'th')}</thead>" if columns else ""
    foot = f"<tfoot>{row(total)}</tfoot>" if total else ""
    body = "\n".join(row(cells) for cells in rows)
    kind = ' class="numbers"' if holds_numbers else ""
    return f"<table{kind}>{head}<tbody>{body}</tbody>{foot}</table>\n"


def folded(title: str, text: str) -> str:
    """Preformatted text that is shown on request."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>\n"


def picture(path: Path, content: Image.Image | Figure, alt: str, image_size: int = 0) -> str:
    """Writes a PNG file to `path` and gives an element that holds the same bytes.

    `image_size` is the side of the images in a grid.
    """
    buffer = io.BytesIO()
    width = ""
    if isinstance(content, Figure):
        content.savefig(buffer, format="png")
        width = f' style="width: {CHART_WIDTH_PER_INCH * content.get_figwidth():.0f}px"'
    else:
        content.save(buffer, format="PNG")
        width = ' class="pixels"' if image_size <= SMALL else ""
    data = buffer.getvalue()
    replace_file(path, functools.partial(Path.write_bytes, data=data))
    encoded = base64.b64encode(data).decode()
    return f'<img{width} alt="{escape(alt)}" src="data:image/png;base64,{encoded}">'


def figure(image: str) -> str:
    """A `picture` of its own."""
    return f"<figure>{image}</figure>\n"


def labelled_rows(labels: Sequence[str], image: str) -> str:
    """A `picture` of images in as many rows as labels, with the labels on the left."""
    entries = "".join(
        f'<li><bdi title="{escape(label)}">{escape(label)}</bdi></li>' for label in labels
    )
    return f'<figure class="rows"><ol>{entries}</ol>{image}</figure>\n'
