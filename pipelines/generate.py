"""Generates images: `python -m pipelines.generate RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("generate")

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pipelines.class_labels import class_number, listed
from pipelines.command import announce, run_command
from pipelines.command_configs import GenerateConfig
from pipelines.data.given_conditions import GivenConditions, read_given
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import image_grid, save_png, to_pil
from pipelines.options import parse_options
from pipelines.processes import bar_disabled, new_accelerator, own_share
from pipelines.run.folder import first_difference
from pipelines.tuned_sampling import filled, uses_tuned
from prior.config import PriorConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json
from tokenizer.storage.pretrained import PretrainedModule

logger = logging.getLogger(__name__)

MOST_PICTURED = 100


def generate(config: GenerateConfig) -> None:
    """Writes the images.

    Raises:
        InputError: the run, a label or the output folder is wrong.
    """
    accelerator = new_accelerator()
    if config.output_dir.exists() and not config.output_dir.is_dir():
        raise InputError(f"output_dir must be a folder, got {config.output_dir}, a file")
    path = config.output_dir / "settings.json"
    if not path.exists() and config.output_dir.is_dir() and any(config.output_dir.glob("*.png")):
        raise InputError(f"output_dir must not hold other images: {config.output_dir} does")
    pipeline = ImageGenerationPipeline.from_pretrained(
        config.run_dir, text_encoder=config.text_encoder
    ).to(accelerator.device)
    prior = pipeline.prior.config
    given = read_given(config.condition, prior)
    chosen = [class_number(label, prior) for label in config.labels]
    numbers = chosen or range(prior.num_classes)
    sampling = filled(config.sampling, pipeline.tuned, bool(numbers or given))
    if pipeline.tuned is not None and uses_tuned(config.sampling):
        logger.info(
            "drawn as hqvae tune-sampling chose: temperature %s, guidance scale %s, top-p %s",
            *(sampling.temperature, sampling.guidance_scale, sampling.top_p),
        )
    settings = {
        "labels": chosen,
        "seed": config.seed,
        "sampling": sampling.model_dump(mode="json"),
        **({"condition": [*given.described, given.file_hash]} if given else {}),
    }
    settings = _settings_of_models(path, pipeline, settings)
    missing = [
        number
        for number in own_share(accelerator, config.num_images).tolist()
        if not _image_path(config, number).exists()
    ]
    labels = [numbers[i % len(numbers)] for i in missing] if numbers else None
    drawn = pipeline.draw(
        missing,
        labels,
        config.seed,
        sampling,
        config.batch_size,
        condition=given and given.take(missing),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2) + "\n"
        replace_file(path, functools.partial(Path.write_text, data=text))
    accelerator.wait_for_everyone()
    names = iter(missing)
    with tqdm(total=len(missing), unit="image", disable=bar_disabled(accelerator)) as bar:
        for batch in drawn:
            for image in batch:
                save_png(to_pil(image), _image_path(config, next(names)))
            bar.update(len(batch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_what_is_said(config, numbers, prior, given)


def _settings_of_models(
    path: Path, pipeline: ImageGenerationPipeline, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings with hashes of the models, which are those of the images that are there.

    Raises:
        InputError: the images at `path` are of others.
    """
    models: dict[str, PretrainedModule[Any]] = {
        "tokenizer": pipeline.tokenizer,
        "prior": pipeline.prior,
    }
    settings = {**{name: model.content_hash() for name, model in models.items()}, **settings}
    if path.exists():
        saved = read_json(path)
        for name, model in models.items():
            if isinstance(saved, dict) and model.has_hash(saved.get(name)):
                saved[name] = settings[name]  # it may be the hash of an earlier version
        difference = first_difference(saved, settings)
        if difference:
            raise InputError(f"output_dir must not hold images of other settings: {difference}")
    return settings


def _write_what_is_said(
    config: GenerateConfig,
    numbers: Sequence[int],
    prior: PriorConfig,
    given: GivenConditions | None,
) -> None:
    """Class or condition of each image beside the images, and the sheet of the first."""
    if numbers:
        _write_labels(config.output_dir, numbers, prior.class_names)
    if given:
        _write_metadata(config.output_dir, given)
    num_conditions = len(given.described) if given else 0
    _contact_sheet(config, max(len(config.labels), prior.num_classes, num_conditions))
    if prior.class_names:
        logger.info("classes: %s", listed(prior.class_names))


def _image_path(config: GenerateConfig, number: int) -> Path:
    return config.output_dir / f"{number:06d}.png"


def _write_labels(folder: Path, numbers: Sequence[int], names: Sequence[str]) -> None:
    """The class of every image that is there, by name or, where there are none, by number."""
    labels = {}
    for path in sorted(folder.glob("[0-9]*.png")):
        number = numbers[int(path.stem) % len(numbers)]
        labels[path.name] = names[number] if names else number
    text = json.dumps(labels, indent=2, ensure_ascii=False) + "\n"
    replace_file(folder / "labels.json", lambda path: path.write_text(text, encoding="utf-8"))


def _write_metadata(folder: Path, given: GivenConditions) -> None:
    """The condition of every image that is there, as Hugging Face's `imagefolder` has it."""
    lines = []
    for path in sorted(folder.glob("[0-9]*.png")):
        described = given.described[int(path.stem) % len(given.described)]
        lines.append(json.dumps({"file_name": path.name, **described}, ensure_ascii=False) + "\n")
    text = "".join(lines)
    replace_file(folder / "metadata.jsonl", lambda path: path.write_text(text, encoding="utf-8"))


def _contact_sheet(config: GenerateConfig, num_classes: int) -> None:
    """The first images in rows; a column per class where the classes come in turn."""
    numbers = range(min(config.num_images, MOST_PICTURED))
    arrays = [np.asarray(Image.open(_image_path(config, number))) for number in numbers]
    images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *arrays[0].shape[:2], -1)
    columns = num_classes if 4 <= num_classes <= 16 else 10
    save_png(image_grid(images.movedim(-1, 1), columns), config.output_dir / "contact_sheet.png")


def _run() -> None:
    config = parse_options(GenerateConfig, "pipelines.generate")
    generate(config)
    announce(f"{config.num_images} images are in {config.output_dir}")


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower batch-size")


if __name__ == "__main__":
    main()
