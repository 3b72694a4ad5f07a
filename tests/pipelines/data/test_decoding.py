"""What is done with the content of an image file: bounded, and told in words."""

import io
import os
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data import decoding as image_decoding
from pipelines.data.decoding import UnreadableImageError, decode_image


def picture(height: int = 12, width: int = 16, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A whole PNG but for its header, which claims another size with a right checksum."""
    content = bytearray(encoded(picture(), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width: int, height: int, depth: int, pixels: bytes) -> bytes:
    """A PNG in RGB whose compressed pixels are those given, before and after its filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*own) for own in chunks)


def png_of_16_bits() -> bytes:
    return png(4, 4, 16, zlib.compress((b"\0" + bytes(range(24))) * 4))


def animated(file_format: str) -> bytes:
    frames = [picture(), picture(), picture().convert("L").convert("RGB")]
    frames[1] = frames[1].rotate(180)
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


def decode(path: Path, content: bytes | None = None) -> tuple[str, ...]:
    if content is not None:
        path.write_bytes(content)
    return decode_image(path, 8, 3).changes


# What is converted


@pytest.mark.parametrize(
    ("name", "content", "changes"),
    [
        ("a.png", encoded(picture(), "PNG"), ()),
        ("a.JPG", encoded(picture(), "JPEG"), ()),
        ("a.webp", encoded(picture(channels=4), "WEBP"), ()),
        ("a.png", encoded(picture(), "JPEG"), ("holds JPEG, read as such",)),
        ("a.jpeg", encoded(picture(), "WEBP"), ("holds WEBP, read as such",)),
        ("a.png", encoded(picture().convert("P"), "PNG"), ("palette, looked up",)),
        ("a.png", encoded(picture().convert("1"), "PNG"), ("one bit per pixel, black and white",)),
        ("a.jpg", encoded(picture().convert("CMYK"), "JPEG"), ("CMYK, converted to RGB",)),
        ("a.png", png_of_16_bits(), ("16 bits per channel, reduced to 8",)),
        ("a.png", animated("PNG"), ("3 frames, the first one is taken",)),
        ("a.webp", animated("WEBP"), ("3 frames, the first one is taken",)),
        ("a.jpg", animated("MPO"), ("3 frames, the first one is taken",)),
    ],
)
def test_what_is_done_beyond_resizing_is_told(
    tmp_path: Path, name: str, content: bytes, changes: tuple[str, ...]
) -> None:
    assert decode(tmp_path / name, content) == changes


def test_sixteen_bits_per_color_keep_their_upper_half(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of_16_bits())
    pixels = decode_image(tmp_path / "a.png", 4, 3).pixels
    expected = np.arange(0, 24, 2, np.uint8).reshape(1, 4, 3).repeat(4, axis=0)
    np.testing.assert_array_equal(pixels, expected)


# What is refused before it costs anything


@pytest.mark.parametrize("side", [8_193, 20_000, 2**31 - 1])
def test_more_pixels_than_the_bound_are_refused_before_they_are_read(
    tmp_path: Path, side: int
) -> None:
    with pytest.raises(UnreadableImageError, match=r"pixels|size|exceeds"):
        decode(tmp_path / "a.png", png_of_size(side, 8_192))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(UnreadableImageError):
        decode(tmp_path / "a.png", png_of_size(width, height))


def test_a_larger_file_than_the_bound_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(encoded(picture(), "WEBP"))
    os.truncate(path, 2**40)  # sparse: it takes no space
    with pytest.raises(UnreadableImageError, match=r"^1,099,511,627,776 bytes are more than"):
        decode(path)


def test_pixels_beyond_the_last_row_are_not_unpacked(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(2**28), 1)
    (tmp_path / "a.png").write_bytes(png(8, 8, 8, bomb))
    times = [time.process_time()]
    decode(tmp_path / "a.png")
    times.append(time.process_time())
    zlib.decompressobj().decompress(bomb, 2**26)
    times.append(time.process_time())
    assert times[1] - times[0] < times[2] - times[1]  # less than a quarter takes


def progressive(num_scans: int, side: int = 512) -> bytes:
    """A JPEG whose last scan is repeated."""
    content = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    assert content.count(b"\xff\xda") == 10
    start = content.rindex(b"\xff\xda")
    return content[:-2] + content[start:-2] * (num_scans - 10) + content[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_they_are_read(tmp_path: Path) -> None:
    assert decode(tmp_path / "a.jpg", progressive(11)) == ()
    with pytest.raises(
        UnreadableImageError, match=r"^5000 scans of 512 × 512 pixels are more than 1,073,741,824$"
    ):
        decode(tmp_path / "a.jpg", progressive(5_000))


def test_scans_are_counted_up_to_the_end_of_the_image_alone() -> None:
    """A thumbnail within and a video behind it are no scans of the picture."""
    thumbnail = encoded(picture(), "JPEG")
    content = encoded(picture(), "JPEG", comment=thumbnail) + thumbnail * 3
    assert thumbnail in content[: len(content) - 3 * len(thumbnail)]
    assert image_decoding._count_scans(content) == 1
    assert image_decoding._count_scans(progressive(17)) == 17


def test_bytes_that_fill_up_and_bare_markers_end_no_count() -> None:
    content = encoded(picture(), "JPEG")
    filled = content[:2] + b"\xff\x01" + b"\xff\xff\xff" + content[2:]
    assert image_decoding._count_scans(filled) == 1
    assert image_decoding._count_scans(content[:2]) == 0
    assert image_decoding._count_scans(b"\xff\xd8\xff\xd9" + content[2:]) == 0


# What is no plain file


def make_socket(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    os.close(descriptor)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "not a regular file"),
        (make_socket, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"text"), "cannot identify image file"),
    ],
)
def test_what_is_no_image_file_is_refused_and_never_waited_for(
    tmp_path: Path, make: Any, reason: str
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=f"^{reason}$"):
        decode(tmp_path / "a.png")


# Memory


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_decoding, "_LARGE_PIXELS", 12 * 16 - 1)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(), "PNG"))
    small = tmp_path / "b.png"
    small.write_bytes(encoded(picture(height=11), "PNG"))
    decoded: list[Path] = []

    def read(own: Path) -> None:
        decode(own)
        decoded.append(own)

    threads = [threading.Thread(target=read, args=(own,)) for own in (path, small)]
    with image_decoding._large_image:  # as if another one were being decoded
        for thread in threads:
            thread.start()
        threads[1].join(timeout=30)
        assert decoded == [small]
    threads[0].join(timeout=30)
    assert decoded == [small, path]


def test_a_lack_of_memory_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_decoding, "convert_image", lack)
    with pytest.raises(MemoryError, match=f"^decoding {tmp_path / 'a.png'}$"):
        decode(tmp_path / "a.png", encoded(picture(), "PNG"))
