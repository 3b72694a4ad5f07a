"""What decoding an image file may cost at most, known before any pixel is read.

Each function raises ValueError with the reason.
"""

import re
import struct

from PIL import Image
from PIL.ImageFile import ImageFile

MAX_BYTES = 2**28
"""Size of a file."""
MAX_PIXELS = 2**26
"""Width times height."""
MAX_SCANNED_PIXELS = 2**30
"""Width times height times the scans of a JPEG: a small file can hold thousands of scans."""
MAX_RUN_LENGTH_CODED = 2**24
"""Bytes, and pixels, of a BMP of runs: Pillow reads these in Python."""
MAX_TAG_VALUES = 2**18
"""Numbers in one table of a TIFF: Pillow makes an object, or a tile, of each."""

# In a scan, 255 is followed by 0 or a restart marker; anything else ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_TYPES_OF_BYTES = {1, 2, 6, 7}
_FOLDERS_OF_TAGS = {0x8769, 0x8825, 0xA005}  # EXIF, GPS, interoperability


def check_size(num_bytes: int) -> None:
    """Refuses an empty or too large file."""
    if num_bytes == 0:
        raise ValueError("empty")
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{num_bytes:,} bytes are more than {MAX_BYTES:,}")


def check_cost(image: Image.Image, content: bytes) -> None:
    """Refuses too many pixels, or too much work on them, by the headers of an opened file."""
    num_pixels = image.width * image.height
    if num_pixels == 0:
        raise ValueError("no pixels")
    size = f"{image.width} × {image.height} pixels"
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"{size} are more than {MAX_PIXELS:,}")
    if image.format in {"JPEG", "MPO"}:
        num_scans = count_scans(content)
        if num_scans * num_pixels > MAX_SCANNED_PIXELS:
            raise ValueError(f"{num_scans} scans of {size} are more than {MAX_SCANNED_PIXELS:,}")
    has_runs = isinstance(image, ImageFile) and any(tile[0] == "bmp_rle" for tile in image.tile)
    if has_runs and max(num_pixels, len(content)) > MAX_RUN_LENGTH_CODED:
        raise ValueError(
            f"{size}, {len(content):,} bytes of runs are more than {MAX_RUN_LENGTH_CODED:,}"
        )
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = tags.get(322, 0), tags.get(323, 0)
        if not isinstance(width, int) or not isinstance(height, int) or width * height > MAX_PIXELS:
            raise ValueError(f"tiles of {width} × {height} pixels are more than {MAX_PIXELS:,}")


def count_scans(content: bytes) -> int:
    """Scans of a JPEG up to its end; what follows, such as a video, is none of it."""
    count, position = 0, 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == _END_OF_IMAGE:
            break
        if marker == 0xFF or marker in _BARE_MARKERS:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            count += 1
            end = _END_OF_SCAN.search(content, position)
            position = end.start() if end else len(content)
    return count


def check_tables(content: bytes) -> None:
    """Refuses a TIFF with long tables, which Pillow reads as it opens the file."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or not {0x2A, 0x2B} & set(content[2:4]):
        return
    is_big = 0x2B in content[2:4]
    number = order + ("Q" if is_big else "I")
    entry = struct.Struct(f"{order}HH{number[1]}{number[1]}")
    pending, seen = [struct.unpack_from(number, content, 8 if is_big else 4)[0]], set()
    while pending:
        start = pending.pop()
        if start in seen or start + 8 > len(content):
            continue
        seen.add(start)
        length = order + ("Q" if is_big else "H")
        (count,) = struct.unpack_from(length, content, start)
        start += struct.calcsize(length)
        for place in range(start, min(start + count * entry.size, len(content)), entry.size):
            if place + entry.size > len(content) or len(seen) > MAX_TAG_VALUES:
                break
            tag, kind, num_values, value = entry.unpack_from(content, place)
            if kind not in _TYPES_OF_BYTES and num_values > MAX_TAG_VALUES:
                raise ValueError(
                    f"{num_values:,} values in a table are more than {MAX_TAG_VALUES:,}"
                )
            if tag in _FOLDERS_OF_TAGS:
                pending.append(value)
