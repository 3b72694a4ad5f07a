"""Says how unusual images are to a run: `python -m pipelines.score RUN FOLDER`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("score")

import shlex
import sys

import torch
from torch import Tensor

from pipelines.command import announce, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.folder_listing import find_images
from pipelines.data.sources import trained_images
from pipelines.drawing import PriorPipeline
from pipelines.evaluation.anomaly import AnomalyScorer, check_priors
from pipelines.evaluation.protocol import library_versions
from pipelines.model_card import without_folders
from pipelines.options import parse_options
from pipelines.processes import new_accelerator
from pipelines.report.scores import ScoredFolder, write_scores
from pipelines.run.folder import load_run
from pipelines.score_config import ScoreConfig
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.errors import InputError


def score(config: ScoreConfig, command: str = "") -> None:
    """Writes the scores of all images of the folder, a page and pictures.

    Args:
        config: what is scored by what.
        command: that the page names.

    Raises:
        InputError: the run has no prior at all, its images or those of the folder are missing or
            wrong.
    """
    run = load_run(TokenizerRunConfig, config.run_dir / "tokenizer" / "config.json")
    run = run.moved_data(config.data_root, config.data_validation_root)
    has_prior = (config.run_dir / "prior").is_dir()
    kind = PriorPipeline if has_prior else TokenizerPipeline
    pipeline = kind.from_pretrained(config.run_dir)
    prior = pipeline.prior if isinstance(pipeline, PriorPipeline) else None
    check_priors(pipeline.tokenizer, prior)
    names, images = _read(config, run)
    accelerator = new_accelerator()
    _, validation = trained_images(run, config.run_dir / "tokenizer", accelerator)
    items = chosen_items(len(validation), config.num_reference, run.training.seed)
    pipeline.to(accelerator.device)
    scorer = AnomalyScorer(pipeline.tokenizer, prior, validation.images_at(items))
    measured = scorer.measure(images)
    folder = config.output_dir or config.run_dir / "scores"
    metadata = {
        "run": config.run_dir.resolve().name,
        "command": without_folders(command),
        "reference": without_folders(validation.description),
        "reference_hash": validation.fingerprint,
        "num_reference": len(items),
        "seed": run.training.seed,
        "versions": library_versions(),
    }
    write_scores(
        ScoredFolder(names, images, measured, scorer.scores(measured)), scorer, folder, metadata
    )
    announce(f"open {folder / 'score.html'}")


def _read(config: ScoreConfig, run: TokenizerRunConfig) -> tuple[list[str], Tensor]:
    """Names and pixels of the folder's images, resized and cropped as in training."""
    names = find_images(config.folder, "folder", follow_links=True).images
    conversion = (run.data.image_size, run.data.channels, run.data.white_value)
    pixels = []
    for name in names:
        try:
            pixels.append(torch.tensor(decode_image(config.folder / name, *conversion).pixels))
        except UnreadableImageError as error:
            raise InputError(
                f"folder: {config.folder / name} is not a readable image: {error}"
            ) from error
    return names, torch.stack(pixels).movedim(-1, 1)


def _run() -> None:
    command = "python -m pipelines.score " + shlex.join(sys.argv[1:])
    score(parse_options(ScoreConfig, "pipelines.score"), command)


def main() -> None:
    """Runs the command line."""
    run_command(_run, "give fewer images at a time")


if __name__ == "__main__":
    main()
