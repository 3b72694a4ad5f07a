"""Stage one: `python -m pipelines.train_tokenizer PRESET`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("train-tokenizer")

import logging

from pipelines.command import TRAINING_MEMORY, announce, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.options import parse_run
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.report.summary import renew_summary
from pipelines.run.folder import check_output_dir
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import TokenizerLoss
from pipelines.training.tokenizer_stage import TokenizerStage
from tokenizer.quantizers import BuildQuantizer

logger = logging.getLogger(__name__)


def train_tokenizer(
    config: TokenizerRunConfig,
    images: tuple[ImageDataset, ImageDataset] | None = None,
    *,
    quantizer: BuildQuantizer | None = None,
    loss: TokenizerLoss | None = None,
) -> None:
    """Trains a tokenizer in `config.output_dir`, or goes on with it.

    Args:
        config: the run.
        images: for training and validation; None opens those that `config.data` names.
        quantizer: builds quantizers from outside the package; None builds the config's.
        loss: in place of the recipe's.

    Raises:
        InputError: something in the config, the data or the folder is wrong.
        DivergenceError: the loss is no longer finite.
    """
    if quantizer is not None:
        tokenizer = config.tokenizer.with_custom_quantizer(quantizer)
        config = config.model_copy(update={"tokenizer": tokenizer})
    config = check_output_dir(config)
    for part in ("prior", "decoder") if config.extend_to is not None else ():
        if (config.run_dir / part / "model").is_dir():
            logger.warning(
                "the %s in %s knows the codes of before: it will not fit the tokenizer any more",
                part,
                config.run_dir / part,
            )
    accelerator = make_accelerator(config)
    stage = TokenizerStage(config, accelerator, images, quantizer=quantizer, loss=loss)
    train(stage, config, accelerator)


def _run() -> None:
    config = parse_run(TOKENIZER_PRESETS, "pipelines.train_tokenizer")
    train_tokenizer(config)
    steps = config.extend_to or config.training.total_steps
    announce(f"step {steps:,} is done; {config.output_dir / 'model'}")
    renew_summary(config.run_dir)


def main() -> None:
    """Runs the command line."""
    run_command(_run, TRAINING_MEMORY)


if __name__ == "__main__":
    main()
