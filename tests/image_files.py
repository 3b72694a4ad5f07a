"""Image files of noise, for the tests of folders and of decoding."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return pixels.squeeze(-1) if channels == 1 else pixels


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def save_classes(root: Path, names: list[str], count: int = 4) -> Path:
    for label, name in enumerate(names):
        for number in range(count):
            save(root / name / f"{number}.png", noise(8, 8, seed=100 * label + number))
    return root


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


class Malicious:
    """Pickled, it makes a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("executed",))
