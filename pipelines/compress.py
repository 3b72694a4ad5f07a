"""Compresses pictures: `python -m pipelines.compress RUN FILES`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("compress")

import functools
from pathlib import Path

from pipelines.coding.layout import SUFFIX
from pipelines.coding.paths import pictures_within, planned
from pipelines.coding.pictures import compressed, search_of
from pipelines.command import announce, run_command
from pipelines.command_configs import CompressConfig
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.sources import trained_images
from pipelines.drawing import PriorPipeline
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.marginals import FILE, Marginals
from pipelines.model_folders import tokenizer_folder
from pipelines.options import parse_options
from pipelines.preprocessing import preprocess
from pipelines.processes import new_accelerator
from pipelines.run.folder import load_run
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file

NUM_COUNTED = 10_000
"""Training images at most, for `marginals`."""


def compress(config: CompressConfig) -> int:
    """Writes a file for each picture.

    Returns:
        The bytes of all.

    Raises:
        InputError: the run or a picture is missing or wrong, or a file would be overwritten.
    """
    pipeline = load_pipeline(config.run_dir, config.model == "prior")
    is_uncounted = config.model == "marginals" and pipeline.marginals is None
    codec = pipeline.codec()
    model = codec.check_model("counts" if is_uncounted else config.model)
    search_of(codec, config.quality)
    conversion = pipeline.original_conversion
    outputs = planned(config.files, pictures_within, config.output_dir, SUFFIX)
    for path in outputs:  # before anything is written
        try:
            size = decode_image(path, None, conversion.channels, conversion.white_value).size
        except UnreadableImageError as error:
            raise InputError(f"files: {path} is not a readable image: {error}") from error
        codec.check_size(*size, model)
    if is_uncounted:
        pipeline.marginals = measured_marginals(config, pipeline.tokenizer)
        codec = pipeline.codec()
        model = codec.check_model(config.model)
    pipeline.to(new_accelerator().device)
    num_bytes = 0
    for path, output in outputs.items():
        image = preprocess(path, conversion).to(pipeline.device)
        content = compressed(codec, image, config.quality, model)
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, functools.partial(Path.write_bytes, data=content))
        num_bytes += len(content)
    announce(f"{len(outputs)} files of {num_bytes:,} bytes are in {config.output_dir}")
    return num_bytes


def load_pipeline(run_dir: Path, with_prior: bool) -> TokenizerPipeline:
    """A run's tokenizer, and its prior if that is needed.

    Raises:
        InputError: one is missing or wrong.
    """
    if with_prior and not (run_dir / "prior").is_dir():
        raise InputError(f"model 'prior' needs a trained prior: there is no {run_dir / 'prior'}")
    kind = PriorPipeline if with_prior else TokenizerPipeline
    return kind.from_pretrained(run_dir)


def measured_marginals(config: CompressConfig, tokenizer: Tokenizer) -> Marginals:
    """Counts the codes of training images, and saves that beside the tokenizer's weights.

    Raises:
        InputError: there is no run with its images.
    """
    accelerator = new_accelerator()
    run = load_run(TokenizerRunConfig, config.run_dir / "tokenizer" / "config.json")
    run = run.moved_data(config.data_root, config.data_validation_root)
    train, _ = trained_images(run, config.run_dir / "tokenizer", accelerator)
    items = chosen_items(len(train), NUM_COUNTED)
    _, usage = measure_reconstruction(tokenizer.to(accelerator.device), train, items, accelerator)
    marginals = Marginals(
        counts=tuple(tuple(counts.tolist()) for counts in usage.counts),
        tokenizer_hash=tokenizer.identity_hash(),
        images=train.fingerprint,
        num_images=len(items),
    )
    folder = tokenizer_folder(config.run_dir)
    marginals.save(folder)
    announce(f"codes of {len(items):,} training images are counted in {folder / FILE}")
    return marginals


def _run() -> None:
    compress(parse_options(CompressConfig, "pipelines.compress"))


def main() -> None:
    """Runs the command line."""
    run_command(_run, "give smaller pictures")


if __name__ == "__main__":
    main()
