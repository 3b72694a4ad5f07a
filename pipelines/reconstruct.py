"""Encodes and decodes images: `python -m pipelines.reconstruct RUN IMAGES`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("reconstruct")

import logging
from pathlib import Path

import torch

from pipelines.command import run_command
from pipelines.command_configs import ReconstructConfig
from pipelines.config import TokenizerRunConfig
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.folder import SHEETS
from pipelines.data.folder_listing import find_images
from pipelines.data.folder_scan import printable
from pipelines.images import comparison, save_png, to_float, to_pil, to_uint8
from pipelines.model_folders import load_tokenizer
from pipelines.options import parse_options
from pipelines.processes import new_accelerator
from pipelines.run.folder import load_run
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

BATCH = 64
MOST_PICTURED = 32


def reconstruct(config: ReconstructConfig) -> None:
    """Writes the reconstructions.

    Raises:
        InputError: the run or an image is missing or wrong, or a file would be overwritten.
    """
    run = load_run(TokenizerRunConfig, config.run_dir / "tokenizer" / "config.json")
    tokenizer = load_tokenizer(config.run_dir, None)
    size = config.image_size or run.data.image_size
    tokenizer.code_maps(size, size)
    tokenizer.costs_for(config.search)
    folder, names = _find(config.images)
    outputs = [(config.output_dir / name).with_suffix(".png") for name in names]
    comparison_path = config.output_dir / "comparison.png"
    existing = next((path for path in [*outputs, comparison_path] if path.exists()), None)
    if existing is not None:
        raise InputError(f"output_dir: {existing} exists already")
    if comparison_path in outputs:
        raise InputError(f"images: none in {config.images} may be called comparison")
    named: dict[Path, str] = {}
    for name, output in zip(names, outputs, strict=True):
        if output in named:
            raise InputError(
                f"images: {printable(named[output])} and {printable(name)} in "
                f"{printable(config.images)} differ only in their suffix"
            )
        named[output] = name
    arrays = []
    conversion = (size, run.data.channels, run.data.white_value)
    for path in (folder / name for name in names):
        try:
            arrays.append(torch.tensor(decode_image(path, *conversion).pixels))
        except UnreadableImageError as error:
            raise InputError(f"images: {path} is not a readable image: {error}") from error
    device = new_accelerator().device
    tokenizer.to(device)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    originals = torch.stack(arrays).movedim(-1, 1)
    decoded = torch.cat(
        [
            to_uint8(tokenizer.decode(indices, config.num_layers)).cpu()
            for images in torch.split(originals, BATCH)
            for indices in [tokenizer.encode(to_float(images).to(device), config.search)]
        ]
    )
    for image, path in zip(decoded, outputs, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(to_pil(image), path)
    save_png(comparison(originals[:MOST_PICTURED], decoded[:MOST_PICTURED]), comparison_path)


def _find(images: Path) -> tuple[Path, list[str]]:
    """A folder, and the names of the images below it."""
    if images.is_dir():
        names = find_images(images, "images", follow_links=True).images
        chosen = [name for name in names if name not in SHEETS]
        if len(chosen) < len(names):
            logger.warning("%s: left out %s", printable(images), " and ".join(SHEETS))
        return images, chosen
    if not images.is_file():
        raise InputError(f"images: {images} does not exist")
    return images.parent, [images.name]


def _run() -> None:
    reconstruct(parse_options(ReconstructConfig, "pipelines.reconstruct"))


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower image-size, or give fewer images at a time")


if __name__ == "__main__":
    main()
