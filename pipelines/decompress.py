"""Pictures of compressed files: `python -m pipelines.decompress RUN FILES`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("decompress")

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines.coding.layout import MAX_BYTES, model_of
from pipelines.coding.paths import compressed_within, planned
from pipelines.coding.pictures import decompressed
from pipelines.command import announce, run_command
from pipelines.command_configs import DecompressConfig
from pipelines.data.folder_scan import printable
from pipelines.drawing import PriorPipeline
from pipelines.images import save_png, to_pil, to_uint8
from pipelines.options import parse_options
from pipelines.processes import new_accelerator
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.errors import InputError

Result = TypeVar("Result")


def decompress(config: DecompressConfig) -> None:
    """Writes a picture for each file.

    Raises:
        InputError: the run or a file is missing or wrong, or a picture would be overwritten.
    """
    outputs = planned(config.files, compressed_within, config.output_dir, ".png")
    has_prior = (config.run_dir / "prior").is_dir()
    needs_prior = any(_of_file(path, model_of) == "prior" for path in outputs)
    pipeline = (PriorPipeline if has_prior and needs_prior else TokenizerPipeline).from_pretrained(
        config.run_dir
    )
    codec = pipeline.codec()
    for path in outputs:  # before anything is written
        _of_file(path, codec.header)
    pipeline.to(new_accelerator().device)
    for path, output in outputs.items():
        image = _of_file(path, lambda content: decompressed(codec, content))
        output.parent.mkdir(parents=True, exist_ok=True)
        save_png(to_pil(to_uint8(image)[0].cpu()), output)
    announce(f"{len(outputs)} pictures are in {config.output_dir}")


def _of_file(path: Path, read: Callable[[bytes], Result]) -> Result:
    """What is read from a file, whose name stands in the error."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        return read(content)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from error


def _run() -> None:
    decompress(parse_options(DecompressConfig, "pipelines.decompress"))


def main() -> None:
    """Runs the command line."""
    run_command(_run)


if __name__ == "__main__":
    main()
