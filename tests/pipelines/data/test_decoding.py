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
from PIL import ExifTags, Image, ImageCms

from pipelines.data import decoding as image_decoding
from pipelines.data.color_profiles import UNUSABLE
from pipelines.data.conversion import convert_image
from pipelines.data.decoding import (
    DecodedImage,
    UnreadableImageError,
    decode_image,
)
from pipelines.data.limits import count_scans
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


def png(
    width: int, height: int, depth: int, pixels: bytes, kind: int = 2, key: bytes = b""
) -> bytes:
    """A PNG, in RGB by default, of such compressed pixels and transparent color."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    transparent = [(b"tRNS", key)] if key else []
    chunks = [(b"IHDR", header), *transparent, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def wide_png(values: np.ndarray, key: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16 bits per channel."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, 16, zlib.compress(rows), kind, struct.pack(f">{len(key)}H", *key))


def tiff(values: np.ndarray, order: str, photometric: int, num_strips: int = 1) -> bytes:
    """An uncompressed TIFF of unsigned or floating-point numbers."""
    height, width, channels = values.shape
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits, sample_format = 8 * values.itemsize, 3 if values.dtype.kind == "f" else 1
    tags = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        262: [photometric],
        273: [8] * num_strips,
        277: [channels],
        278: [height],
        279: [len(pixels)],
        339: [sample_format] * channels,
    }
    end = 8 + len(pixels)
    places, arrays = end + 2 + 12 * len(tags) + 4, b""
    entries = struct.pack(f"{order}H", len(tags))
    for tag, numbers in tags.items():
        value = numbers[0]
        if len(numbers) > 1:
            value, array = places + len(arrays), struct.pack(f"{order}{len(numbers)}I", *numbers)
            arrays += array
        entries += struct.pack(f"{order}HHII", tag, 4, len(numbers), value)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end)
    return start + pixels + entries + bytes(4) + arrays


def animated(file_format: str) -> bytes:
    frames = [picture(), picture(), picture().convert("L").convert("RGB")]
    frames[1] = frames[1].rotate(180)
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:])


OTHER_FORMAT = "another format than its suffix, read as such"
ON_WHITE = "transparent pixels, composited on white"
UPRIGHT = "turned upright by its EXIF orientation"
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6  # to be turned clockwise


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
        ("a.webp", encoded(picture(channels=4), "WEBP"), (ON_WHITE,)),
        ("a.png", encoded(picture(channels=4).convert("LA"), "PNG"), (ON_WHITE,)),
        ("a.png", encoded(picture(), "PNG", transparency=picture().getpixel((0, 0))), (ON_WHITE,)),
        ("a.png", encoded(picture().convert("RGBA"), "PNG"), ()),  # opaque
        ("a.jpg", encoded(picture(), "JPEG", exif=TURNED), (UPRIGHT,)),
        ("a.tif", encoded(picture(), "TIFF", exif=TURNED), (UPRIGHT,)),
        ("a.tif", encoded(picture().convert("YCbCr"), "TIFF"), ("YCbCr, converted to RGB",)),
        ("a.png", encoded(picture(), "JPEG"), (f"{OTHER_FORMAT} (JPEG)",)),
        ("a.jif", encoded(picture(), "BMP"), (f"{OTHER_FORMAT} (BMP)",)),
        ("a.png", encoded(picture().convert("P"), "PNG"), ("palette, looked up",)),
        ("a.png", encoded(picture().convert("1"), "PNG"), ("one bit per pixel, black and white",)),
        ("a.jpg", encoded(picture().convert("CMYK"), "JPEG"), ("CMYK, converted to RGB",)),
        ("a.bmp", encoded(picture(), "BMP"), ()),
        ("a.TIF", encoded(picture(), "TIFF"), ()),
        ("a.jfif", encoded(picture(), "JPEG"), ()),
        (
            "a.png",
            wide_png(np.arange(1200).reshape(20, 20, 3)),
            ("16 bits per channel, reduced to 8 (6 of 256 levels, values up to 1,199)",),
        ),
        ("a.png", encoded(picture(7, 9), "PNG"), ("enlarged (9 × 7 pixels)",)),
        (
            "a.png",
            encoded(picture(10, 200), "PNG"),
            ("cropped by more than half (5 % of 200 × 10 pixels kept)",),
        ),
        *(
            (name, animated(file_format), ("several frames, the first one is taken (of 3)",))
            for name, file_format in (("a.png", "PNG"), ("a.webp", "WEBP"), ("a.jpg", "MPO"))
        ),
    ],
)
def test_what_is_done_beyond_resizing_is_told(
    tmp_path: Path, name: str, content: bytes, changes: tuple[str, ...]
) -> None:
    assert decode(tmp_path / name, content) == changes


def decoded(folder: Path, content: bytes, channels: Any = 3, **options: Any) -> DecodedImage:
    (folder / "a.png").write_bytes(content)
    return decode_image(folder / "a.png", 8, channels, **options)


WIDE = np.random.default_rng(0).integers(0, 2**16, (8, 8, 4), np.uint16)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        *((wide_png(WIDE[..., :count]), WIDE[..., :count]) for count in (1, 2, 3, 4)),
        (tiff(WIDE[..., :1], "<", 1), WIDE[..., :1]),
        (tiff(WIDE[..., :1], ">", 1), WIDE[..., :1]),
        (tiff(WIDE[..., :1], "<", 0), 65535 - WIDE[..., :1]),  # white is zero
        (tiff(WIDE[..., :3], "<", 2), WIDE[..., :3]),
        (tiff(WIDE, ">", 2), WIDE),
    ],
)
def test_sixteen_bits_become_the_nearest_byte_of_white(
    tmp_path: Path, content: bytes, values: np.ndarray
) -> None:
    channels, white = values.shape[2], 40_000
    num_colors = channels - (channels in (2, 4))
    for given in (None, white):
        image = decoded(tmp_path, content, channels, white_value=given)
        expected = np.rint(values / 257)
        colors = values[..., :num_colors]
        if given:
            expected[..., :num_colors] = np.rint(np.minimum(colors / white, 1) * 255)
        np.testing.assert_array_equal(image.pixels, expected)
        assert image.value_range is not None
        assert image.value_range.highest == colors.max()
        assert image.value_range.levels.bit_count() == len(np.unique(expected[..., :num_colors]))


FOUR_BITS = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
PACKED = b"".join(b"\0" + bytes(row[::2] * 16 + row[1::2]) for row in FOUR_BITS)


@pytest.mark.parametrize(
    ("content", "is_transparent"),
    [
        (wide_png(WIDE[..., :1], (int(WIDE[0, 0, 0]),)), WIDE[..., 0] == WIDE[0, 0, 0]),
        (wide_png(np.ones((8, 8, 3)), (0, 0, 0)), np.zeros((8, 8), np.bool_)),  # lower halves
        (wide_png(WIDE[..., :3], (*WIDE[2, 3, :3].tolist(),)), np.arange(64).reshape(8, 8) == 19),
        (png(8, 8, 4, zlib.compress(PACKED), 0, b"\0\5"), FOUR_BITS == 5),
    ],
)
def test_a_transparent_color_is_that_of_all_its_bits(
    tmp_path: Path, content: bytes, is_transparent: np.ndarray
) -> None:
    alpha = decoded(tmp_path, content, 4).pixels[..., 3]
    np.testing.assert_array_equal(alpha, np.where(is_transparent, 0, 255))
    assert (decoded(tmp_path, content).pixels[is_transparent] == 255).all()


@pytest.mark.parametrize("numbers", [np.float32, np.uint32])
def test_numbers_without_a_common_white_are_refused(tmp_path: Path, numbers: Any) -> None:
    with pytest.raises(UnreadableImageError, match=r"a layout of many bits that is not read$"):
        decoded(tmp_path, tiff(WIDE[..., :1].astype(numbers), "<", 1))


# Color profiles

CASES = Path(__file__).parents[2] / "fixtures" / "cases"
with Image.open(CASES / "icc_adobe.png") as stored:
    ADOBE, ADOBE_PROFILE = stored.copy(), stored.info["icc_profile"]
with Image.open(CASES / "icc_none.png") as stored:
    SRGB = np.asarray(stored.convert("RGB")).astype(float)
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CONVERTED = "color profile, converted to sRGB"


def decoded_at_64(path: Path, image: Image.Image, **options: Any) -> DecodedImage:
    return decode_image(save(path, image, **options), 64, 3)


@pytest.mark.parametrize(
    ("suffix", "mode", "options", "tolerance"),
    [
        (".png", "RGB", {}, 1),
        (".png", "RGBA", {}, 1),
        (".webp", "RGB", {"lossless": True}, 1),
        (".tif", "RGB", {}, 1),
        (".jpg", "RGB", {"quality": 100, "subsampling": 0}, 9),
    ],
)
def test_colors_of_a_profile_become_those_of_srgb(
    tmp_path: Path, suffix: str, mode: str, options: dict[str, Any], tolerance: float
) -> None:
    image = ADOBE.convert(mode)
    stored = decoded_at_64(tmp_path / f"a{suffix}", image, icc_profile=ADOBE_PROFILE, **options)
    assert stored.changes == (CONVERTED,)
    np.testing.assert_allclose(stored.pixels, SRGB, atol=tolerance)
    assert np.abs(np.asarray(ADOBE) - SRGB).mean() > 9  # what was wrong without


def test_sixteen_bits_a_palette_and_profiles_go_together(tmp_path: Path) -> None:
    wide = wide_png(np.asarray(ADOBE).astype(np.uint16) * 257)
    profile = chunk(b"iCCP", b"-\0\0" + zlib.compress(ADOBE_PROFILE))
    (tmp_path / "a.png").write_bytes(wide[:33] + profile + wide[33:])
    image = decode_image(tmp_path / "a.png", 64, 3)
    assert image.changes[1:] == (CONVERTED,)
    np.testing.assert_allclose(image.pixels, SRGB, atol=1)
    palette = ADOBE.quantize(64)
    image = decoded_at_64(tmp_path / "a.png", palette, icc_profile=ADOBE_PROFILE)
    assert image.changes == ("palette, looked up", CONVERTED)
    expected = decoded_at_64(tmp_path / "b.png", palette.convert("RGB"), icc_profile=ADOBE_PROFILE)
    np.testing.assert_array_equal(image.pixels, expected.pixels)


def cmyk_profile() -> bytes:
    """A printer of which any full ink prints the gray of L* = 50, and black prints black."""
    colors = bytearray()
    for inks in range(16):
        colors += bytes([255 if inks == 0 else 0 if inks & 1 else 128, 128, 128])
    identity = bytes(range(256))
    matrix = struct.pack(
        ">9i", *(65536 * (row == column) for row in range(3) for column in range(3))
    )
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + colors + identity * 3
    size = 128 + 4 + 12 + len(table)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02100000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_inks_become_what_their_profile_prints(tmp_path: Path, suffix: str) -> None:
    inks = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    inks.paste((0, 0, 0, 0), (0, 0, 64, 32))
    stored = decoded_at_64(tmp_path / f"a{suffix}", inks, icc_profile=cmyk_profile())
    assert stored.changes == ("CMYK, converted to RGB by its color profile",)
    np.testing.assert_allclose(stored.pixels[:24], 255, atol=1)
    np.testing.assert_allclose(stored.pixels[40:], 119, atol=1)  # (0.584)³ in sRGB


@pytest.mark.parametrize(
    ("mode", "profile", "reason"),
    [
        ("RGB", SRGB_PROFILE, None),
        ("RGB", b"rubbish", "cannot open profile"),
        ("RGB", ADOBE_PROFILE[:300], ""),
        ("L", ADOBE_PROFILE, "it is of RGB, the image of GRAY"),
        ("RGB", cmyk_profile(), "it is of CMYK, the image of RGB"),
    ],
)
def test_colors_stay_as_they_are_in_srgb_and_by_a_profile_that_cannot_be_used(
    tmp_path: Path, mode: str, profile: bytes, reason: str | None
) -> None:
    image = ADOBE.convert(mode)
    stored = decoded_at_64(tmp_path / "a.png", image, icc_profile=profile)
    np.testing.assert_array_equal(stored.pixels, np.asarray(image.convert("RGB")))
    if reason is None:
        assert stored.changes == ()
    else:
        (change,) = stored.changes
        assert change.startswith(f"{UNUSABLE} (")
        assert reason in change


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("zTXt", ()), ("iCCP", (f"{UNUSABLE} (cannot open profile from string)",))],
)
def test_more_text_or_profile_than_pillow_unpacks_does_not_stop_sound_pixels(
    tmp_path: Path, kind: str, changes: tuple[str, ...]
) -> None:
    content = encoded(Image.fromarray(noise(8, 8)), "PNG")
    long = chunk(kind.encode(), b"-\0\0" + zlib.compress(bytes(2**24)))
    image = decoded(tmp_path, content[:33] + long + content[33:])
    np.testing.assert_array_equal(image.pixels, noise(8, 8))
    assert image.changes == changes


# What becomes of the pixels

COLOR, GRAY, RGBA = noise(8, 8), noise(8, 8, 1), noise(8, 8, 4)
RGBA[:2, :, 3] = [[0], [255]]
ALPHA = RGBA[..., 3:] / 255
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
    multiplied = convert_image(Image.fromarray(pixels).convert("RGBa"), 9, 3)
    assert multiplied[:, 8].tolist() == [[255, 255, 255]] * 9


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_stand_upright(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    path = save(tmp_path / f"a{suffix}", np.rot90(upright), exif=TURNED)
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(WIDE, "<", 2, num_strips=2**18 + 1), "262,145 values in a table are more than"),
        (
            encoded(Image.new("L", (4097, 4097)), "BMP").replace(
                *(struct.pack("<IIHHI", 4097, 4097, 1, 8, is_packed) for is_packed in (0, 1))
            ),
            "4097 × 4097 pixels, .* bytes of runs are more than",
        ),
    ],
    ids=["tables", "runs"],
)
def test_what_pillow_would_read_in_python_is_bounded(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    with pytest.raises(UnreadableImageError, match=f"^{reason}"):
        decoded(tmp_path, content)


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
    assert count_scans(content) == 1
    assert count_scans(progressive(17)) == 17
    filled = thumbnail[:2] + b"\xff\x01" + b"\xff\xff\xff" + thumbnail[2:]
    assert count_scans(filled) == 1
    assert count_scans(thumbnail[:2]) == 0
    assert count_scans(b"\xff\xd8\xff\xd9" + thumbnail[2:]) == 0


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
