"""Generates images: `python -m pipelines.generate RUN`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from pipelines.command import announce, parse_options, run_command
from pipelines.generation import ImageGenerationPipeline, SamplingConfig
from pipelines.plots import image_grid, to_pil
from pipelines.processes import new_accelerator, own_share
from tokenizer.pretrained import InputError, StrictConfig

MOST_PICTURED = 100


class GenerateConfig(StrictConfig):
    """Generates images as OUTPUT_DIR/000000.png and so on, and contact_sheet.png of the first.

    Image i depends on the seed, i and its label alone: not on batch size or processes.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or of a saved pipeline."""
    output_dir: Path
    """Folder for the images; it must not hold any yet."""
    num_images: PositiveInt = 64
    """How many."""
    labels: tuple[NonNegativeInt, ...] = ()
    """Classes, taken in turn; none given: all classes in turn."""
    seed: NonNegativeInt = 0
    """Of all random numbers."""
    batch_size: PositiveInt = 64
    """Images at a time."""
    sampling: SamplingConfig = SamplingConfig()


def generate(config: GenerateConfig) -> None:
    """Writes the images.

    Raises:
        InputError: the run, a label or the output folder is wrong.
    """
    accelerator = new_accelerator()
    if config.output_dir.is_dir() and any(config.output_dir.glob("*.png")):
        raise InputError(f"output_dir must not hold images yet: {config.output_dir} does")
    pipeline = ImageGenerationPipeline.from_pretrained(config.run_dir).to(accelerator.device)
    own_images = own_share(accelerator, config.num_images).tolist()
    labels = [config.labels[i % len(config.labels)] for i in own_images] if config.labels else None
    drawn = pipeline.draw(own_images, labels, config.seed, config.sampling, config.batch_size)
    accelerator.wait_for_everyone()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    names = iter(own_images)
    with tqdm(total=len(own_images), unit="image", disable=not accelerator.is_main_process) as bar:
        for batch in drawn:
            for image in batch:
                to_pil(image).save(config.output_dir / f"{next(names):06d}.png")
            bar.update(len(batch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _contact_sheet(config, max(len(config.labels), pipeline.prior.config.num_classes))


def _contact_sheet(config: GenerateConfig, num_classes: int) -> None:
    """The first images in rows; a column per class where the classes come in turn."""
    paths = [
        config.output_dir / f"{number:06d}.png"
        for number in range(min(config.num_images, MOST_PICTURED))
    ]
    arrays = [np.asarray(Image.open(path)) for path in paths]
    images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *arrays[0].shape[:2], -1)
    columns = num_classes if 4 <= num_classes <= 16 else 10
    image_grid(images.movedim(-1, 1), columns).save(config.output_dir / "contact_sheet.png")


def main() -> None:
    """Reads the command line."""
    config = parse_options(GenerateConfig, "pipelines.generate")
    generate(config)
    announce(f"{config.num_images} images are in {config.output_dir}")


if __name__ == "__main__":
    run_command(main, "lower batch-size")
