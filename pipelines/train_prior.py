"""Stage two: `python -m pipelines.train_prior PRESET`."""

from pipelines.command import TRAINING_MEMORY, announce, parse_run, run_command
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.sources import trained_images
from pipelines.presets import PRIOR_PRESETS
from pipelines.run.folder import check_output_dir, load_run
from pipelines.training.loop import make_accelerator, train
from pipelines.training.prior_stage import PriorStage
from tokenizer.storage.errors import InputError


def train_prior(config: PriorRunConfig) -> None:
    """Trains a prior in `config.output_dir` over the codes of the tokenizer beside it.

    Raises:
        InputError: something in the config, the tokenizer's run or the folder is wrong.
        DivergenceError: the loss is no longer finite.
    """
    tokenizer_config = config.tokenizer_dir / "config.json"
    if not tokenizer_config.is_file():
        raise InputError(f"run_dir must hold a trained tokenizer: there is no {tokenizer_config}")
    tokenizer_run = load_run(TokenizerRunConfig, tokenizer_config)
    check_output_dir(config)
    accelerator = make_accelerator(config)
    images = trained_images(tokenizer_run, config.tokenizer_dir, accelerator)
    stage = PriorStage(config, *images, accelerator)
    train(stage, config, accelerator)


def main() -> None:
    """Reads the command line."""
    config = parse_run(PRIOR_PRESETS, "pipelines.train_prior")
    train_prior(config)
    announce(f"step {config.training.total_steps} is done; {config.output_dir / 'model'}")


if __name__ == "__main__":
    run_command(main, TRAINING_MEMORY)
