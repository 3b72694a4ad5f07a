"""What quickstart sees of a folder, and what it chooses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.folder_listing import split_folders
from pipelines.planning import look_at
from tokenizer.storage.errors import InputError


def write(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_folder_is_gray_where_all_pictures_are_and_as_large_as_most_of_them(
    tmp_path: Path,
) -> None:
    """Whatever their mode; what cannot be read is left to training, unless it is all."""
    gray = [write(tmp_path / f"{n}.png", (70 + n, 50 + n), "L") for n in range(3)]
    Image.open(gray[0]).convert("RGBA").save(gray[0])
    assert look_at(gray) == (51, 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert look_at([*gray, tmp_path / "broken.png"]) == (51, 1)
    assert look_at([*gray, write(tmp_path / "color.png", (51, 80))]) == (51, 3)
    with pytest.raises(InputError, match="none of"):
        look_at([tmp_path / "broken.png"])


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val"), ("train", "val")),
        (("train", "test", "notes"), ("train", "test")),
        (("train",), ("train", None)),
        (("train", "cat"), (".", None)),
        (("val",), (".", None)),
        ((), (".", None)),
    ],
)
def test_training_and_validation_folders_are_known_by_their_names(
    folders: tuple[str, ...], expected: tuple[str, str | None], tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    train, validation = expected
    assert split_folders(tmp_path) == (tmp_path / train, validation and tmp_path / validation)
