"""Folders of fuzzed files: none may crash, hang or exhaust what reads it.

Every file is decoded by a process of its own, under limits. Then training's loader reads the whole
folder, and `check_data` must have said of every file what the loader did.
"""

import io
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipelines.check_data import check_data
from pipelines.command_configs import CheckDataConfig
from pipelines.config import DataConfig
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.folder_scan import printable
from pipelines.data.sources import load_images
from tests.faults.damage import spoiled
from tests.faults.jobs import in_child

NUM_TRIALS = 50
FILES = 20
"""Of a folder."""
IMAGE_SIZE = 16
MEMORY = 2 * 2**30
SECONDS = 60
"""Of processor time for one file; the largest image that is allowed takes half of it."""
SIDES = (0, 1, 7, 4_000, 8_192, 8_193, 16_383, 65_535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
"""What a header is made to claim."""
# In several scripts, with control characters, and with a byte that is no UTF-8.
NAMES = ["plain", "Ünïcødé", "名前", "имя", "اسم", "🙂", "a\tc\nd", "\x1b[31m", "-rf", "\udcff"]


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Writes a folder of files and reads them in all ways."""
    files, held_out = folder / "files", folder / "held_out"
    for path in (files, held_out, folder / "cache"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (files, held_out):  # a folder without any readable image is refused as a whole
        path.mkdir(parents=True)
        (path / "sound.png").write_bytes(_encoded("PNG", "RGB"))
    # What a single file does to its reader, it would do to the loader.
    for entry in range(FILES):
        path = _write(files, number * FILES + entry, generator)
        outcome = path.is_dir() or in_child(lambda: _decode(path), MEMORY, SECONDS)  # noqa: B023
        if outcome not in (True, "decoded", "refused"):
            return f"{printable(path.name)}: {outcome}"
    return _disagreement(files, held_out, folder / "cache")


def _decode(path: Path) -> str:
    try:
        pixels = decode_image(path, IMAGE_SIZE, 3).pixels
    except UnreadableImageError as error:
        is_line = str(error) and "\n" not in str(error)
        return "refused" if is_line else f"refused without a reason in one line: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "decoded" if pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) else f"shape {pixels.shape}"


def _disagreement(files: Path, held_out: Path, cache_dir: Path) -> str:
    """Whether the loader leaves out others than `check_data` says."""
    config = DataConfig(
        dataset="folder",
        root=files,
        validation_root=held_out,
        image_size=IMAGE_SIZE,
        skip_unreadable=True,
        cache_dir=cache_dir,
    )
    dataset = load_images(config, "train")
    report = check_data(CheckDataConfig(folder=files, image_size=IMAGE_SIZE, skip_unreadable=True))
    counts = report.num_files
    num_files = sum(not path.is_dir() for path in files.iterdir())
    if sum(counts.values()) != num_files or counts["refused"]:
        return f"{counts} of {num_files} files"
    if counts["used"] + counts["converted"] != len(dataset):
        return f"{counts}, but {len(dataset)} are loaded"
    # For each file that was decoded in vain the loader notes the name and the reason.
    noted = [json.loads(path.read_text()) for path in cache_dir.glob("folder-train-*/*.json")]
    start = "is not a readable image: "
    missing = [
        own.file
        for own in report.problems
        if own.reason.startswith(start)
        and json.dumps(own.reason.removeprefix(start))[1:-1] not in json.dumps(noted)
    ]
    return f"{missing} are left out for other reasons" if missing else ""


# Files, each a function of number and generator


def _write(folder: Path, number: int, generator: np.random.Generator) -> Path:
    """Writes one file and gives its path."""
    stem = f"{number:05d} {NAMES[number % len(NAMES)]}"
    if number % FILES == FILES - 1:
        path = folder / f"{stem}.png"
        ENTRIES[number // FILES % len(ENTRIES)](path)
        return path
    file_format, mode, options = SOUND[generator.integers(len(SOUND))]
    # A format that is not read comes under the name of one that is.
    suffixes = {"JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
    path = folder / f"{stem}{suffixes.get(file_format, '.png')}"
    damage = spoiled if number % 4 else _blow_up
    path.write_bytes(damage(_encoded(file_format, mode, **options), generator))
    return path


def _picture(mode: str, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 14, 4))
    smooth = Image.fromarray(pixels.astype(np.uint8)).resize((52, 37))
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    return smooth.convert(mode) if mode in {"LA", "RGBA"} else smooth.convert("RGB").convert(mode)


def _encoded(file_format: str, mode: str, num_frames: int = 1, **options: Any) -> bytes:
    frames = [_picture(mode, seed) for seed in range(num_frames)]
    if num_frames > 1:
        options |= {"save_all": True, "append_images": frames[1:]}
    file = io.BytesIO()
    frames[0].save(file, file_format, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # lies on its side
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SOUND: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    *((file_format, "RGB", {}) for file_format in ("WEBP", "GIF", "BMP", "TIFF")),
    *(("BMP", mode, {}) for mode in ("1", "L", "P")),
    *(("TIFF", mode, {}) for mode in ("1", "P", "RGBA", "CMYK", "I;16")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg")),
    *((file_format, "RGB", {"num_frames": 3}) for file_format in ("PNG", "WEBP", "GIF", "TIFF")),
    *((file_format, "RGB", {"icc_profile": PROFILE}) for file_format in ("PNG", "JPEG", "TIFF")),
    ("JPEG", "RGB", {"progressive": True, "exif": EXIF}),
    ("PNG", "RGB", {"exif": EXIF}),
    ("WEBP", "RGBA", {"lossless": True}),
]


def _blow_up(content: bytes, generator: np.random.Generator) -> bytes:
    """Lets the header claim another width and height, with a checksum that fits."""
    width, height = (SIDES[row] for row in generator.integers(0, len(SIDES), 2))
    changed = bytearray(content)

    def put(position: int, template: str, *values: int) -> None:
        largest = 2 ** (8 * struct.calcsize(template) // len(values)) - 1
        struct.pack_into(template, changed, position, *(min(own, largest) for own in values))

    if content.startswith(b"\x89PNG"):
        put(16, ">II", width, height)
        put(29, ">I", zlib.crc32(changed[12:29]))
    elif content.startswith(b"\xff\xd8"):
        start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        put(start + 5, ">HH", height, width)
    elif content.startswith(b"BM"):
        put(18, "<II", width, height)
    elif content.startswith(b"II*\0"):
        (start,) = struct.unpack_from("<I", content, 4)
        (num_tags,) = struct.unpack_from("<H", content, start)
        for place in range(start + 2, start + 2 + 12 * num_tags, 12):
            (tag,) = struct.unpack_from("<H", content, place)
            if tag in (256, 257):  # width and height, as 32-bit numbers
                changed[place + 2] = 4
                put(place + 8, "<I", width if tag == 256 else height)
    elif content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little") >> 28 << 28
        put(21, "<I", bits | (min(width, 2**14 - 1)) | (min(height, 2**14 - 1) << 14))
    return bytes(changed)


def _socket(path: Path) -> None:
    # Relative: the path of a socket may have some hundred letters only.
    descriptor = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


ENTRIES: tuple[Callable[[Path], Any], ...] = (
    os.mkfifo,
    _socket,
    lambda path: path.symlink_to("nowhere.png"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/dev/zero"),
    Path.mkdir,
    Path.touch,
)
