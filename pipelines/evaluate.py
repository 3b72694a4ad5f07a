"""Measures a run: `python -m pipelines.evaluate RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare()

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.command import announce, parse_options, run_command
from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import ImageDataset
from pipelines.data.sources import trained_images
from pipelines.evaluation.features import ExtractorConfig, load_extractor
from pipelines.evaluation.measurements import (
    EvaluationConfig,
    Results,
    evaluate_generation,
    evaluate_reconstruction,
)
from pipelines.generation import ImageGenerationPipeline, model_folder
from pipelines.processes import new_accelerator
from pipelines.run.folder import load_run
from tokenizer import Tokenizer
from tokenizer.storage.files import replace_file


class EvaluateConfig(EvaluationConfig):
    """Measures the reconstructions and the generations of a run.

    Prints a table and writes RUN/evaluation/*.json, each number with its protocol.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with tokenizer/ and prior/."""
    what: Literal["all", "reconstruction", "generation"] = "all"
    """What is measured."""
    extractor: ExtractorConfig = ExtractorConfig()
    """Network for the distances; Inception gives FID."""


def evaluate(
    config: EvaluateConfig, images: tuple[ImageDataset, ImageDataset] | None = None
) -> dict[str, Results]:
    """Results of "reconstruction" and "generation"; the main process writes them.

    Args:
        config: what is measured, and how.
        images: for training and validation, where the tokenizer was given its images, too.

    Raises:
        InputError: a part of the run, the data or the extractor's weights is missing or wrong.
    """
    accelerator = new_accelerator()
    run = load_run(TokenizerRunConfig, config.run_dir / "tokenizer" / "config.json")
    tokenizer = Tokenizer.from_pretrained(model_folder(config.run_dir / "tokenizer"))
    pipeline = None
    if config.what != "reconstruction":
        pipeline = ImageGenerationPipeline.from_pretrained(config.run_dir).to(accelerator.device)
        pipeline.sampler(config.sampling)  # refuses settings that do not fit
        tokenizer = pipeline.tokenizer
    extractor = load_extractor(config.extractor).to(accelerator.device)
    tokenizer.to(accelerator.device)
    train, validation = trained_images(run, config.run_dir / "tokenizer", accelerator, images)
    results: dict[str, Results] = {}
    if config.what != "generation":
        results["reconstruction"] = evaluate_reconstruction(
            tokenizer, train, validation, extractor, config, accelerator
        )
    if pipeline is not None:
        results["generation"] = evaluate_generation(
            pipeline, train, validation, extractor, config, accelerator
        )
    if accelerator.is_main_process:
        command = "python -m pipelines.evaluate " + shlex.join(sys.argv[1:])
        write_results(config.run_dir, command, results)
    accelerator.wait_for_everyone()
    return results


def write_results(run_dir: Path, command: str, results: dict[str, Results]) -> None:
    """Writes RUN/evaluation/*.json, one file for each kind of result."""
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    for name, metrics in results.items():
        text = json.dumps({"command": command, "metrics": metrics}, indent=2) + "\n"
        replace_file(folder / f"{name}.json", functools.partial(Path.write_text, data=text))


def table(results: dict[str, Results]) -> str:
    """One line per number."""
    lines = []
    for name, metrics in results.items():
        lines.append(name)
        for metric, entry in metrics.items():
            value = entry["value"]
            values = value if isinstance(value, list) else [value]
            lines.append(f"  {metric:26} " + " ".join(f"{number:.6g}" for number in values))
    return "\n".join(lines)


def _run() -> None:
    results = evaluate(parse_options(EvaluateConfig, "pipelines.evaluate"))
    announce(table(results))


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower batch-size, or num-images if that does not help")


if __name__ == "__main__":
    main()
