"""Laws of preprocessing: a picture becomes what training makes of its file, in whatever form."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.decoding import decode_image
from pipelines.images import to_float
from pipelines.preprocessing import Conversion, prepare_mask, prepare_picture, preprocess
from tests.image_files import noise, save
from tokenizer.storage.errors import InputError

SQUARE = Conversion(channels=3, multiple=8, image_size=16)
CASES = Path(__file__).parent.parent / "fixtures" / "cases"


def trained_on(path: Path, conversion: Conversion = SQUARE) -> torch.Tensor:
    pixels = decode_image(path, 16, conversion.channels, conversion.white_value).pixels
    return to_float(torch.tensor(pixels).movedim(-1, 0)[None])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_in_any_form_is_what_training_makes_of_its_file(
    tmp_path: Path, channels: Any
) -> None:
    conversion = SQUARE._replace(channels=channels)
    pixels = noise(20, 30, channels)
    path = save(tmp_path / "a.png", pixels)
    expected = trained_on(path, conversion)
    for form in (
        path,
        str(path),
        Image.open(path),
        pixels,
        [pixels],
        pixels.reshape(1, 20, 30, -1),
    ):
        assert torch.equal(preprocess(form, conversion), expected)
    assert torch.equal(preprocess([path, pixels], conversion), expected.repeat(2, 1, 1, 1))


def with_orientation(path: Path, number: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = number
    return save(path, noise(20, 30), exif=exif)


def test_what_a_file_says_of_itself_counts_for_an_opened_image_too(tmp_path: Path) -> None:
    for path in (
        CASES / "icc_adobe.png",
        *(with_orientation(tmp_path / f"{number}.png", number) for number in range(1, 9)),
        with_orientation(tmp_path / "a.tiff", 6),
        save(tmp_path / "palette.png", Image.fromarray(noise(20, 30)).quantize(7)),
        save(tmp_path / "gray16.png", (noise(20, 30, 1).astype(np.uint16) << 8) + 77),
    ):
        assert torch.equal(preprocess(Image.open(path), SQUARE), trained_on(path)), path
    dark = SQUARE._replace(white_value=4095)
    path = save(tmp_path / "gray12.png", noise(20, 30, 1).astype(np.uint16) * 16)
    assert torch.equal(preprocess(Image.open(path), dark), trained_on(path, dark))
    assert not torch.equal(preprocess(path, dark), preprocess(path, SQUARE))


@given(height=st.integers(8, 40), width=st.integers(8, 40), multiple=st.sampled_from([1, 2, 4, 8]))
def test_the_original_size_is_cropped_about_the_center_alone(
    height: int, width: int, multiple: int
) -> None:
    pixels = noise(height, width)
    image = prepare_picture(pixels, Conversion(3, multiple, None)).image
    top, left = height % multiple // 2, width % multiple // 2
    rows, columns = height // multiple * multiple, width // multiple * multiple
    expected = pixels[top : top + rows, left : left + columns]
    np.testing.assert_array_equal(image.movedim(0, -1), expected)


def test_tensors_are_images_already() -> None:
    floats = torch.rand(2, 3, 8, 24) * 2 - 1
    assert preprocess(floats, SQUARE) is floats
    assert torch.equal(preprocess([floats[0], floats[1]], SQUARE), floats)
    assert torch.equal(preprocess(floats[0], SQUARE), floats[:1])
    pixels = torch.tensor(noise(8, 24)).movedim(-1, 0)
    assert torch.equal(preprocess(pixels, SQUARE), to_float(pixels[None]))
    assert torch.equal(preprocess(pixels[None], SQUARE), to_float(pixels[None]))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "images must hold at least one, got none"),
        (3, "images must be a PIL image, a path, .* or a list of them, got int"),
        ([noise(9, 9), None], r"images\[1\] must be a PIL image.* width\), got NoneType"),
        ("none.png", "images: none.png is not a readable image: No such file"),
        (["."], r"images: \. is not a readable image: not a regular file"),
        (noise(9, 9).astype(float), r"images must be uint8 .* got \(9, 9, 3\) of float64"),
        (noise(9, 9, 3).transpose(2, 0, 1), r"images must be uint8 .* got \(3, 9, 9\) of uint8"),
        (np.zeros((0, 9, 3), np.uint8), r"images must have pixels, got \(0, 9, 3\)"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            r"images must be floats .*\(3, 8, 8\) of .*int64",
        ),
        (torch.zeros(8, 8), r"images must be floats on \[-1, 1\] or bytes .* got \(8, 8\)"),
        ([torch.zeros(3, 8, 8), noise(9, 9)], "one size and type .* got 8 by 8 and 16 by 16"),
        (Image.new("F", (9, 9)), "images is not a readable image: mode F"),
        (Image.new("RGB", (0, 9)), "images is not a readable image: no pixels"),
        (Image.open(io.BytesIO((CASES / "icc_adobe.png").read_bytes()[:-40])), "not a readable"),
    ],
)
def test_what_is_no_picture_is_refused_on_one_line(pictures: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        preprocess(pictures, SQUARE)
    assert "\n" not in str(caught.value)


def test_a_picture_below_the_least_size_is_refused() -> None:
    with pytest.raises(InputError, match="image must have at least 8 by 8 pixels, got 30 by 7"):
        prepare_picture(noise(7, 30), SQUARE.resized("original"))
    with pytest.raises(InputError, match="image_size must be a multiple of 8, got 12"):
        SQUARE.resized(12)


MASK = np.arange(20 * 30).reshape(20, 30) % 7 == 3


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.astype(np.uint8),
        MASK.astype(np.uint8) * 255,
        np.where(MASK, 128, 127).astype(np.uint8),
        MASK.astype(float),
        torch.tensor(MASK),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(np.dstack([MASK.astype(np.uint8) * 255, np.zeros(MASK.shape, np.uint8)])),
    ],
)
def test_masks_of_all_kinds_mean_the_same(mask: Any, tmp_path: Path) -> None:
    found = prepare_mask(mask, (30, 20), SQUARE, is_tensor=True)
    np.testing.assert_array_equal(found, MASK)
    if isinstance(mask, Image.Image):
        mask.save(path := tmp_path / "mask.png")
        for given_path in (path, str(path)):
            found = prepare_mask(given_path, (30, 20), SQUARE, is_tensor=True)
            np.testing.assert_array_equal(found, MASK)


@given(row=st.integers(0, 39), column=st.integers(0, 59))
def test_a_pixel_is_redrawn_if_any_part_of_it_is(row: int, column: int) -> None:
    mask = np.zeros((40, 60), bool)
    mask[row, column] = True
    found = prepare_mask(mask, (60, 40), SQUARE, is_tensor=False)  # 2.5 of its pixels in one
    expected = np.zeros((16, 16), bool)
    if 10 <= column < 50:
        first, last = (int(place / 2.5) for place in (row, row + 0.99))
        left, right = (int((place - 10) / 2.5) for place in (column, column + 0.99))
        expected[first : last + 1, left : right + 1] = True
    np.testing.assert_array_equal(found, expected)
    cropped = prepare_mask(mask, (60, 40), SQUARE.resized("original"), is_tensor=False)
    np.testing.assert_array_equal(cropped, mask[:, 2:58])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:, 1:], "mask must have the size of image, 30 by 20, got 29 by 20"),
        (Image.fromarray(MASK.T), "mask must have the size of image, 30 by 20, got 20 by 30"),
        (MASK[..., None], r"mask must be a PIL image, a path or an array .* got \(20, 30, 1\)"),
        ("no-mask.png", "^mask: no-mask.png is not a readable image: No such file"),
        (3, "mask must be a PIL image, a path or an array .* got int"),
        (MASK * 0.5, "mask must hold bytes, or nothing but zeros and ones, got float64 from 0.0"),
    ],
)
def test_what_is_no_mask_is_refused_on_one_line(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_mask(mask, (30, 20), SQUARE, is_tensor=False)
