"""Stage two: `python -m pipelines.train_prior PRESET`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("train-prior")

import logging

from accelerate import Accelerator

from pipelines.class_labels import listed
from pipelines.command import TRAINING_MEMORY, announce, run_command
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.codes import extract_codes
from pipelines.data.conditions import ConditionedSplits, load_conditions
from pipelines.data.dataset import ImageDataset, image_hashes
from pipelines.data.sources import trained_images
from pipelines.model_folders import steps_done
from pipelines.options import parse_run
from pipelines.presets import PRIOR_PRESETS
from pipelines.processes import batch_size_without_gradient
from pipelines.report.summary import renew_summary
from pipelines.run.checkpoints import check_sources, newest_sources
from pipelines.run.folder import check_output_dir, check_trained_tokenizer, load_run
from pipelines.text_encoders import TextEncoder, check_source
from pipelines.training.loop import make_accelerator, train
from pipelines.training.prior_stage import PriorStage, make_prior
from prior import Conditioner
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)


def train_prior(
    config: PriorRunConfig,
    images: tuple[ImageDataset, ImageDataset] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    conditioner: Conditioner | None = None,
    text_encoder: TextEncoder | None = None,
) -> None:
    """Trains a prior in `config.output_dir` over the codes of the tokenizer beside it.

    Args:
        config: the run.
        images: for training and validation, where the tokenizer was given its images, too.
        tokenizer: of `config.tokenizer_dir`, where loading it needs a part from outside the
            package; None loads it.
        conditioner: from outside the package; it gets the labels of the images, whatever they are.
        text_encoder: from outside the package, in place of `config.condition.text_encoder`.

    Raises:
        InputError: something in the config, the tokenizer's run or the folder is wrong.
        DivergenceError: the loss is no longer finite.
    """
    check_trained_tokenizer(config.run_dir)
    tokenizer_run = load_run(TokenizerRunConfig, config.tokenizer_dir / "config.json").moved_data(
        config.data_root, config.data_validation_root
    )
    config = check_output_dir(config)
    _check_encoder(config, text_encoder)
    accelerator = make_accelerator(config)
    images = trained_images(tokenizer_run, config.tokenizer_dir, accelerator, images)
    conditions = None
    if config.condition_kind not in ("class", "none"):
        with accelerator.main_process_first():
            conditions = load_conditions(
                config.condition, tokenizer_run.data, *images, text_encoder, accelerator.device
            )
    stage = prior_stage(config, *images, accelerator, tokenizer, conditioner, conditions)
    done = steps_done(config.tokenizer_dir)
    if done is not None and done[0] < done[1] and accelerator.is_main_process:
        logger.warning(
            "the tokenizer is at step %s of %s: trained further, it will no longer fit this prior",
            *(f"{step:,}" for step in done),
        )
    train(stage, config, accelerator)
    if stage.model.config.class_names and accelerator.is_main_process:
        logger.info("classes: %s", listed(stage.model.config.class_names))


def _check_encoder(config: PriorRunConfig, given: TextEncoder | None) -> None:
    """Checks the encoder of captions; it is loaded once these are found.

    Raises:
        InputError: there are captions and it is missing, or there are none and it is given.
    """
    if config.condition_kind == "text" and given is None:
        check_source(config.condition.text_encoder)
    elif config.condition_kind != "text" and given is not None:
        raise InputError(f"condition.kind must be text beside a text_encoder, got {given}")


def prior_stage(
    config: PriorRunConfig,
    train_images: ImageDataset,
    validation_images: ImageDataset,
    accelerator: Accelerator,
    tokenizer: Tokenizer | None = None,
    conditioner: Conditioner | None = None,
    conditions: ConditionedSplits | None = None,
) -> PriorStage:
    """Loads the tokenizer if need be, checks that all fits, and extracts the codes of the images.

    Raises:
        InputError: no trained tokenizer, or a prior that cannot be trained like this.
    """
    if tokenizer is None:
        tokenizer = Tokenizer.from_pretrained(config.tokenizer_dir / "model")
    tokenizer.to(accelerator.device).eval()
    model = make_prior(config, tokenizer, train_images, conditioner, conditions)
    saved = newest_sources(config.output_dir)
    tokenizer_hash, *others = tokenizer.identities()
    if saved is not None and saved.get("tokenizer weights") in others:
        tokenizer_hash = saved["tokenizer weights"]  # earlier versions called it by another hash
    sources = {
        "tokenizer weights": tokenizer_hash,
        **image_hashes(train_images, validation_images),
        **(conditions.sources if conditions else {}),
    }
    check_sources(config.output_dir, saved, sources)
    codes, validation_codes = (
        extract_codes(
            tokenizer,
            images,
            config.output_dir / "codes",
            accelerator,
            flips=is_training and config.horizontal_flip,
            keeps_latents=is_training and config.targets == "posterior",
            batch_size=batch_size_without_gradient(config.training, accelerator),
            search=config.codes.search,
        )
        for images, is_training in ((train_images, True), (validation_images, False))
    )
    return PriorStage(
        config, model, tokenizer, codes, validation_codes, sources, accelerator, conditions
    )


def _run() -> None:
    config = parse_run(PRIOR_PRESETS, "pipelines.train_prior")
    train_prior(config)
    steps = config.extend_to or config.training.total_steps
    announce(f"step {steps:,} is done; {config.output_dir / 'model'}")
    renew_summary(config.run_dir, config.data_root, config.data_validation_root)


def main() -> None:
    """Runs the command line."""
    run_command(_run, TRAINING_MEMORY)


if __name__ == "__main__":
    main()
