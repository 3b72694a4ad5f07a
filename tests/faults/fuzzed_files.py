"""Damaged and strange files for the trials of `data.py`, each a function of seed and number."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDES = (0, 1, 7, 4_000, 8_192, 8_193, 16_383, 65_535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
"""What a header is made to claim."""


def _picture(mode: str, seed: int = 0, height: int = 37, width: int = 52) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 4))
    smooth = Image.fromarray(pixels.astype(np.uint8)).resize((width, height))
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    if mode in {"LA", "RGBA"}:
        return smooth.convert(mode)
    return smooth.convert("RGB").convert(mode)


def _encoded(file_format: str, mode: str, num_frames: int = 1, **options: Any) -> bytes:
    frames = [_picture(mode, seed) for seed in range(num_frames)]
    if num_frames > 1:
        options |= {"save_all": True, "append_images": frames[1:]}
    file = io.BytesIO()
    frames[0].save(file, file_format, **options)
    return file.getvalue()


def originals() -> dict[str, tuple[str, bytes]]:
    """Sound files: suffix and content by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "described"
    made: dict[str, tuple[str, str, dict[str, Any]]] = {
        "JPEG progressive": ("JPEG", "RGB", {"progressive": True, "exif": exif}),
        "PNG with EXIF": ("PNG", "RGB", {"exif": exif}),
        "PNG animated": ("PNG", "RGB", {"num_frames": 3}),
        "WEBP lossless": ("WEBP", "RGBA", {"lossless": True, "exif": exif}),
        "WEBP animated": ("WEBP", "RGB", {"num_frames": 3}),
        "GIF animated": ("GIF", "P", {"num_frames": 3}),
        "TIFF compressed": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    }
    modes = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK")}
    modes |= dict.fromkeys(("WEBP", "GIF", "BMP", "TIFF"), ("RGB",))
    for kind, own_modes in modes.items():
        for mode in own_modes:
            made[f"{kind} {mode}"] = (kind, mode, {})
    suffixes = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
    return {
        name: (suffixes.get(kind, ""), _encoded(kind, mode, **options))
        for name, (kind, mode, options) in made.items()
    }


# Damages


def _truncate(content: bytes, draws: np.random.Generator) -> bytes:
    return content[: draws.integers(0, len(content))]


def _flip_bits(content: bytes, draws: np.random.Generator) -> bytes:
    flipped = bytearray(content)
    for position in draws.integers(0, len(content), draws.integers(1, 20)):
        flipped[position] ^= 1 << draws.integers(0, 8)
    return bytes(flipped)


def _change_header(content: bytes, draws: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for position in draws.integers(0, min(64, len(content)), draws.integers(1, 5)):
        changed[position] = draws.integers(0, 256)
    return bytes(changed)


def _move_block(content: bytes, draws: np.random.Generator) -> bytes:
    start, end, target = sorted(draws.integers(0, len(content), 3).tolist())
    return content[:start] + content[end:target] + content[start:end] + content[target:]


def _repeat_block(content: bytes, draws: np.random.Generator) -> bytes:
    start, end = sorted(draws.integers(0, len(content), 2).tolist())
    return content[:end] + content[start:end] * int(draws.integers(1, 200)) + content[end:]


def _zero_block(content: bytes, draws: np.random.Generator) -> bytes:
    start, end = sorted(draws.integers(0, len(content), 2).tolist())
    return content[:start] + bytes(end - start) + content[end:]


def _append(content: bytes, draws: np.random.Generator) -> bytes:
    return content + draws.bytes(int(draws.integers(1, 10_000)))


def _blow_up(content: bytes, draws: np.random.Generator) -> bytes:
    """Lets the header claim another width and height, with a checksum that fits."""
    width, height = (SIDES[row] for row in draws.integers(0, len(SIDES), 2))
    changed = bytearray(content)

    def put(position: int, template: str, *values: int) -> None:
        size = struct.calcsize(template) // len(values)
        largest = 2 ** (8 * size) - 1
        changed[position : position + size * len(values)] = struct.pack(
            template, *(min(value, largest) for value in values)
        )

    if content.startswith(b"\x89PNG"):
        put(16, ">II", width, height)
        put(29, ">I", zlib.crc32(changed[12:29]))
    elif content.startswith(b"\xff\xd8"):
        start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        put(start + 5, ">HH", height, width)
    elif content.startswith(b"GIF"):
        put(6, "<HH", width, height)
    elif content.startswith(b"BM"):
        put(18, "<II", width, height)
    elif content.startswith(b"II"):
        for tag, value in ((256, width), (257, height)):
            entry = content.find(struct.pack("<HHI", tag, 4, 1))
            if entry >= 0:
                put(entry + 8, "<I", value)
    elif content[12:16] == b"VP8X":
        for position, value in ((24, width), (27, height)):
            changed[position : position + 3] = min(value, 2**24 - 1).to_bytes(3, "little")
    elif content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little") >> 28 << 28
        put(21, "<I", bits | (min(width, 2**14 - 1)) | (min(height, 2**14 - 1) << 14))
    else:
        put(26, "<HH", min(width, 2**14 - 1), min(height, 2**14 - 1))
    return bytes(changed)


DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _truncate,
    _flip_bits,
    _change_header,
    _move_block,
    _repeat_block,
    _zero_block,
    _append,
    _blow_up,
)

# Entries that are no plain files


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # Relative: the path of a socket may have some hundred letters only.
    descriptor = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere.png")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _link_out(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


ENTRIES = (_pipe, _socket, _dangling_link, _link_to_itself, _link_out, _folder, _nothing)
NAMES = (
    "plain",
    "Ünïcødé",
    "名前",
    "имя",
    "اسم",
    "नाम",
    "🙂",
    "a b\tc\nd",
    "\x1b[31m",
    "-rf",
    "\udcff",
)


def write(folder: Path, number: int, seed: int, sound: dict[str, tuple[str, bytes]]) -> Path:
    """Writes one file of the trials and gives its path."""
    draws = np.random.default_rng([seed, number])
    stem = f"{number:05d} {NAMES[number % len(NAMES)]}"
    if number % 20 == 19:
        path = folder / f"{stem}.png"
        ENTRIES[number // 20 % len(ENTRIES)](path)
        return path
    kinds = list(sound.values())
    suffix, content = kinds[draws.integers(0, len(kinds))]
    # A format that is not read comes under the name of one that is.
    suffix = suffix or str(draws.choice([".png", ".jpg", ".webp"]))
    path = folder / f"{stem}{suffix}"
    damage = DAMAGES[number % len(DAMAGES)]
    path.write_bytes(damage(content, draws))
    return path
