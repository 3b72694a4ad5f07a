"""Compresses pictures: `python -m pipelines.compress RUN FILES`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("compress")

import functools
from pathlib import Path

from pipelines.coding.codec import Codec
from pipelines.coding.layout import SUFFIX
from pipelines.coding.paths import pictures_within, planned
from pipelines.coding.pictures import compressed, search_of
from pipelines.command import announce, run_command
from pipelines.command_configs import CompressConfig
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.options import parse_options
from pipelines.preprocessing import preprocess
from pipelines.processes import new_accelerator
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file


def compress(config: CompressConfig) -> int:
    """Writes a file for each picture.

    Returns:
        The bytes of all.

    Raises:
        InputError: the run or a picture is missing or wrong, or a file would be overwritten.
    """
    pipeline = TokenizerPipeline.from_pretrained(config.run_dir)
    codec = Codec(pipeline.tokenizer)
    model = codec.check_model(config.model)
    search_of(codec, config.quality)
    conversion = pipeline.original_conversion
    outputs = planned(config.files, pictures_within, config.output_dir, SUFFIX)
    for path in outputs:  # before anything is written
        try:
            size = decode_image(path, None, conversion.channels, conversion.white_value).size
        except UnreadableImageError as error:
            raise InputError(f"files: {path} is not a readable image: {error}") from error
        codec.check_size(*size)
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


def _run() -> None:
    compress(parse_options(CompressConfig, "pipelines.compress"))


def main() -> None:
    """Runs the command line."""
    run_command(_run, "give smaller pictures")


if __name__ == "__main__":
    main()
