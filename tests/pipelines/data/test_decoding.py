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
from pipelines.data.decoding import UnreadableImageError, convert_image, decode_image
from pipelines.data.shapes import LUMINANCE
from tests.image_files import noise, save


def picture(height: int = 12, width: int = 16, channels: int = 3) -> Image.Image:
    return Image.fromarray(noise(height, width, channels))


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
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


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


# What becomes of the pixels

COLOR, GRAY, RGBA = noise(8, 8), noise(8, 8, 1), noise(8, 8, 4)
RGBA[:2, :, 3] = [[0], [255]]
ALPHA = RGBA[..., 3:] / 255
WIDE = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
BLOCKS = np.kron(noise(2, 2), np.ones((4, 4, 1), np.uint8))
PALETTE = Image.fromarray(BLOCKS).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
HIDDEN = PALETTE.copy()
HIDDEN.info["transparency"] = 0


@pytest.mark.parametrize(
    ("image", "expected", "tolerance"),
    [
        (COLOR, COLOR, 0),
        (COLOR, COLOR @ LUMINANCE, 0.51),
        (COLOR, np.dstack([COLOR, np.full((8, 8), 255)]), 0),
        (GRAY, GRAY, 0),
        (GRAY, np.dstack([GRAY] * 3), 0),
        (WIDE, np.rint(WIDE / 257), 0),
        (WIDE, np.dstack([np.rint(WIDE / 257)] * 3), 0),
        (RGBA, ALPHA * RGBA[..., :3] + (1 - ALPHA) * 255, 1),
        (RGBA, RGBA, 0),
        (RGBA, np.dstack([RGBA[..., :3] @ LUMINANCE, RGBA[..., 3]]), 0.51),
        (PALETTE, BLOCKS, 1),
        (HIDDEN, np.where(np.asarray(PALETTE)[..., None] == 0, 255, BLOCKS), 1),
        (HIDDEN, np.dstack([BLOCKS, np.where(np.asarray(PALETTE) == 0, 0, 255)]), 1),
        (GRAY > 127, np.dstack([255 * (GRAY > 127)] * 3), 0),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), np.full((8, 8, 3), [255, 0, 0]), 0),
    ],
)
def test_modes_become_channels_with_the_same_colors(
    image: Any, expected: np.ndarray, tolerance: float
) -> None:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    expected = expected.reshape(8, 8, -1)
    converted = convert_image(image, 8, expected.shape[2])
    np.testing.assert_allclose(converted.astype(float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("height", "width"), [(8, 20), (20, 8), (48, 96), (60, 30), (4, 8), (8, 9)]
)
def test_the_result_is_that_of_resizing_the_shorter_side_and_cropping_the_center(
    height: int, width: int
) -> None:
    image = picture(height, width)
    converted = convert_image(image, 8, 3).astype(float)
    scale = 8 / min(height, width)
    resized = image.resize((int(scale * width), int(scale * height)), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).astype(float)
    top, left = (resized.height - 8) // 2, (resized.width - 8) // 2
    if width == 9:  # half a pixel off either way
        sides = [pixels[:, :8], pixels[:, 1:]]
        errors = [np.abs(converted - other).mean() for other in (sum(sides) / 2, *sides)]
        assert errors[0] == min(errors)
    else:
        expected = pixels[top : top + 8, left : left + 8]
        np.testing.assert_allclose(converted, expected, atol=0 if scale == 1 else 1)


def test_hidden_colors_under_full_transparency_do_not_bleed_when_resizing() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (255, 0, 0, 255)
    pixels[:, 16:] = (0, 255, 0, 0)
    assert convert_image(Image.fromarray(pixels), 9, 4)[..., 1].max() == 0
    assert convert_image(Image.fromarray(pixels), 9, 3)[:, 8].tolist() == [[255, 255, 255]] * 9


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_images_stand_upright(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save(tmp_path / f"a{suffix}", np.rot90(upright), exif=exif)
    np.testing.assert_allclose(decode_image(path, 8, 3).pixels, upright, atol=4)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
def test_the_first_frame_is_taken_as_it_is(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(2)]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "lossless": True}
    path = save(tmp_path / f"a{suffix}", frames[0], **options)
    np.testing.assert_array_equal(decode_image(path, 8, 3).pixels, noise(8, 8))


# What is refused before it costs anything


@pytest.mark.parametrize(
    ("width", "height"), [(8_193, 8_192), (20_000, 8_192), (2**31 - 1, 8_192), (0, 5), (5, 0)]
)
def test_no_pixels_or_more_than_the_bound_are_refused_before_they_are_read(
    tmp_path: Path, width: int, height: int
) -> None:
    with pytest.raises(UnreadableImageError, match=r"pixels|size|exceeds|identify"):
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
    filled = thumbnail[:2] + b"\xff\x01" + b"\xff\xff\xff" + thumbnail[2:]
    assert image_decoding._count_scans(filled) == 1
    assert image_decoding._count_scans(thumbnail[:2]) == 0
    assert image_decoding._count_scans(b"\xff\xd8\xff\xd9" + thumbnail[2:]) == 0


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
        (lambda path: picture().save(path, "GIF"), "cannot identify image file"),
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

    def read(path: Path) -> None:
        decode(path)
        decoded.append(path)

    threads = [threading.Thread(target=read, args=(each,)) for each in (path, small)]
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
