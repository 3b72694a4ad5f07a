"""Fine-tunes the decoder of a run: `python -m pipelines.finetune_decoder RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("finetune-decoder")

from pipelines.command import TRAINING_MEMORY, announce, run_command
from pipelines.data.dataset import ImageDataset
from pipelines.data.sources import trained_images
from pipelines.decoder_run import DecoderRunConfig, check_networks, parse_decoder_run
from pipelines.model_folders import is_finished
from pipelines.report.summary import renew_summary
from pipelines.run.folder import check_output_dir
from pipelines.training.decoder_stage import DecoderStage
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import TokenizerLoss
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError


def finetune_decoder(
    config: DecoderRunConfig,
    images: tuple[ImageDataset, ImageDataset] | None = None,
    *,
    quantizer: BuildQuantizer | None = None,
    loss: TokenizerLoss | None = None,
) -> None:
    """Trains the decoder of a tokenizer on its hard codes in `config.output_dir`, or goes on.

    Args:
        config: the run, from `decoder_run`.
        images: for training and validation, where the tokenizer was given its images, too.
        quantizer: builds quantizers from outside the package, if the tokenizer has such.
        loss: in place of the recipe's.

    Raises:
        InputError: the tokenizer's run is not finished, its codes have changed since, or something
            in the config, the data or the folder is wrong.
        DivergenceError: the loss is no longer finite.
    """
    check_networks(config)
    if not is_finished(config.tokenizer_dir):
        raise InputError(f"RUN must hold a finished tokenizer: {config.tokenizer_dir} is not")
    config = check_output_dir(config)
    accelerator = make_accelerator(config)
    images = trained_images(config, config.tokenizer_dir, accelerator, images)
    stage = DecoderStage(config, accelerator, images, quantizer=quantizer, loss=loss)
    train(stage, config, accelerator)


def _run() -> None:
    config = parse_decoder_run("pipelines.finetune_decoder")
    finetune_decoder(config)
    steps = config.extend_to or config.training.total_steps
    announce(f"step {steps:,} is done; {config.output_dir / 'model'}")
    renew_summary(config.run_dir, config.data.root, config.data.validation_root)


def main() -> None:
    """Runs the command line."""
    run_command(_run, TRAINING_MEMORY)


if __name__ == "__main__":
    main()
