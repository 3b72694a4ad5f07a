"""Encodes and decodes images: `python -m pipelines.reconstruct RUN IMAGES`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare()

from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import PositiveInt

from pipelines.command import parse_options, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.data.decoding import SUFFIXES, UnreadableImageError, decode_image
from pipelines.generation import model_folder
from pipelines.images import comparison, save_png, to_float, to_pil, to_uint8
from pipelines.processes import new_accelerator
from pipelines.run.folder import load_run
from tokenizer import Tokenizer
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.errors import InputError

BATCH = 64
MOST_PICTURED = 32


class ReconstructConfig(StrictConfig):
    """Encodes images and decodes them again, from all layers or the first ones.

    Each image is resized and cropped as in training. OUTPUT_DIR gets the reconstructions under
    the names of the originals and a comparison.png of the first pairs.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """An image file, or a folder of them."""
    output_dir: Path
    """Folder for the reconstructions; nothing in it is overwritten."""
    num_layers: PositiveInt | None = None
    """Decode from so many layers only, counted from the coarsest."""
    image_size: PositiveInt | None = None
    """Side in pixels; None takes that of the training images."""


def reconstruct(config: ReconstructConfig) -> None:
    """Writes the reconstructions.

    Raises:
        InputError: the run or an image is missing or wrong, or a file would be overwritten.
    """
    run = load_run(TokenizerRunConfig, config.run_dir / "tokenizer" / "config.json")
    tokenizer = Tokenizer.from_pretrained(model_folder(config.run_dir / "tokenizer"))
    size = config.image_size or run.data.image_size
    tokenizer.code_maps(size, size)
    paths = _image_paths(config.images)
    outputs = [config.output_dir / f"{path.stem}.png" for path in paths]
    comparison_path = config.output_dir / "comparison.png"
    existing = next((path for path in [*outputs, comparison_path] if path.exists()), None)
    if existing is not None:
        raise InputError(f"output_dir: {existing} exists already")
    if len(set(outputs)) < len(outputs):
        raise InputError(f"images: two files in {config.images} differ only in their suffix")
    arrays = []
    for path in paths:
        try:
            arrays.append(torch.tensor(decode_image(path, size, run.data.channels).pixels))
        except UnreadableImageError as error:
            raise InputError(f"images: {path} is not a readable image: {error}") from error
    device = new_accelerator().device
    tokenizer.to(device)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    originals = torch.stack(arrays).movedim(-1, 1)
    decoded = torch.cat(
        [
            to_uint8(
                tokenizer.decode(tokenizer.encode(to_float(images).to(device)), config.num_layers)
            ).cpu()
            for images in torch.split(originals, BATCH)
        ]
    )
    for image, path in zip(decoded, outputs, strict=True):
        save_png(to_pil(image), path)
    save_png(comparison(originals[:MOST_PICTURED], decoded[:MOST_PICTURED]), comparison_path)


def _image_paths(images: Path) -> list[Path]:
    if images.is_dir():
        paths = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"images: {images} holds no {', '.join(SUFFIXES)} file")
        return paths
    if not images.is_file():
        raise InputError(f"images: {images} does not exist")
    return [images]


def _run() -> None:
    reconstruct(parse_options(ReconstructConfig, "pipelines.reconstruct"))


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower image-size, or give fewer images at a time")


if __name__ == "__main__":
    main()
