"""Measures a run: `python -m pipelines.evaluate RUN`."""

if __name__ == "__main__":
    from pipelines import startup

    startup.prepare("evaluate")

import contextlib
import functools
import json
import logging
import shlex
import shutil
import sys
from pathlib import Path

from accelerate import Accelerator

from pipelines.command import announce, run_command
from pipelines.command_configs import EvaluateConfig, ExtractorConfig
from pipelines.config import DataConfig, TokenizerRunConfig
from pipelines.data.conditions import trained_conditions
from pipelines.data.dataset import ImageDataset
from pipelines.data.sources import load_folder, trained_images
from pipelines.evaluation.feature_shares import FeatureStore, identity_key
from pipelines.evaluation.features import FeatureExtractor, load_extractor
from pipelines.evaluation.judges import check_extractor
from pipelines.evaluation.measurements import compare_sets, evaluate_generation
from pipelines.evaluation.metrics import check_num_images
from pipelines.evaluation.protocol import Results, compared_numbers
from pipelines.evaluation.reconstruction import evaluate_reconstruction
from pipelines.evaluation.reference import STATISTICS_SUFFIXES, Reference, load_statistics
from pipelines.generation import ImageGenerationPipeline
from pipelines.model_folders import load_tokenizer
from pipelines.options import parse_options
from pipelines.processes import new_accelerator
from pipelines.report.summary import renew_summary
from pipelines.run.folder import load_run
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import replace_file

logger = logging.getLogger(__name__)


def evaluate(
    config: EvaluateConfig, images: tuple[ImageDataset, ImageDataset] | None = None
) -> dict[str, Results]:
    """Results of "reconstruction" and "generation", or "folders"; the main process writes them.

    Args:
        config: what is measured, and how.
        images: for training and validation, where the tokenizer was given its images, too.

    Raises:
        InputError: a part of the run, the data or the extractor's weights is missing or wrong.
    """
    accelerator = new_accelerator()
    folder = config.output_dir or (config.run_dir and config.run_dir / "evaluation")
    shares = _share_folder(config, folder)
    if config.run_dir is None:
        results = {"folders": _compare_folders(config, accelerator, shares)}
    else:
        results = _measure_run(config, config.run_dir, accelerator, images, shares)
    if accelerator.is_main_process and folder is not None:
        write_results(folder, "python -m pipelines.evaluate " + shlex.join(sys.argv[1:]), results)
        if shares is not None and not config.keep_features:
            shutil.rmtree(shares, ignore_errors=True)
            with contextlib.suppress(OSError):  # others, which are kept or unfinished
                shares.parent.rmdir()
    accelerator.wait_for_everyone()
    return results


def _share_folder(config: EvaluateConfig, folder: Path | None) -> Path | None:
    """Where finished shares of features lie, one folder for each evaluation unless they are kept.

    So evaluations with other options may run at the same time, and delete what is their own.
    """
    if folder is None:
        return None
    if config.keep_features:
        return folder / "features"
    return folder / "features" / f"unfinished-{identity_key(config.model_dump(mode='json'))}"


def _measure_run(
    config: EvaluateConfig,
    run_dir: Path,
    accelerator: Accelerator,
    images: tuple[ImageDataset, ImageDataset] | None,
    shares: Path | None,
) -> dict[str, Results]:
    run = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    run = run.moved_data(config.data_root, config.data_validation_root)
    tokenizer = load_tokenizer(run_dir, None)
    pipeline = None
    if config.what != "reconstruction":
        check_num_images(config.num_images, config.num_images)
        pipeline = ImageGenerationPipeline.from_pretrained(run_dir).to(accelerator.device)
        pipeline.sampler(config.sampling)  # refuses settings that do not fit
        tokenizer = pipeline.tokenizer
    tokenizer.costs_for(config.search)
    extractor = _load_extractor(config)
    check_extractor(extractor, tokenizer)
    tokenizer.to(accelerator.device)
    if extractor is not None:
        extractor.to(accelerator.device)
    splits = trained_images(run, run_dir / "tokenizer", accelerator, images)
    reference = None
    if isinstance(config.reference, Path):
        reference = _open(config.reference, "reference", run.data, accelerator)
    # Images that the caller brings are not decoded into the cache: it is not theirs.
    store = FeatureStore(shares, run.data.cache_dir if images is None else None)
    results: dict[str, Results] = {}
    if config.what != "generation":
        results["reconstruction"] = evaluate_reconstruction(
            tokenizer, *splits, extractor, config, accelerator, reference, store
        )
    if pipeline is not None:
        assert extractor is not None
        conditions = None
        if pipeline.prior.config.condition is not None:
            with accelerator.main_process_first():
                conditions = trained_conditions(
                    run_dir / "prior",
                    pipeline.prior.config,
                    run.data,
                    splits,
                    accelerator.device,
                )
        results["generation"] = evaluate_generation(
            pipeline, *splits, extractor, config, accelerator, reference, conditions, store
        )
    return results


def _load_extractor(config: EvaluateConfig) -> FeatureExtractor | None:
    """None: only errors are measured, as is said where nothing was asked for but cannot be had."""
    if config.extractor.kind == "none":
        return None
    try:
        return load_extractor(config.extractor)
    except InputError as error:
        if config.what != "reconstruction" or config.extractor != ExtractorConfig():
            raise
        logger.warning("errors alone, without rFID: %s", error)
        return None


def _open(path: Path, field: str, data: DataConfig, accelerator: Accelerator) -> Reference:
    if path.suffix in STATISTICS_SUFFIXES and not path.is_dir():
        return load_statistics(path)
    return load_folder(data, path, field, accelerator)


def _compare_folders(
    config: EvaluateConfig, accelerator: Accelerator, shares: Path | None
) -> Results:
    assert config.folders is not None
    assert config.image_size is not None
    extractor = load_extractor(config.extractor).to(accelerator.device)
    data = DataConfig(dataset="folder", image_size=config.image_size)
    reference = _open(config.folders[1], "folders", data, accelerator)
    images = load_folder(data, config.folders[0], "folders", accelerator)
    store = FeatureStore(shares, data.cache_dir)
    return compare_sets(images, reference, extractor, config, accelerator, store)


def write_results(folder: Path, command: str, results: dict[str, Results]) -> None:
    """Writes a JSON file for each kind of result."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, metrics in results.items():
        text = json.dumps({"command": command, "metrics": metrics}, indent=2) + "\n"
        replace_file(folder / f"{name}.json", functools.partial(Path.write_text, data=text))


def table(results: dict[str, Results]) -> str:
    """One line per number, with how many images it is of; below them what is to be said of some."""
    lines = []
    for name, metrics in results.items():
        lines.append(name)
        notes: dict[str, list[str]] = {}
        for metric, entry in metrics.items():
            value = entry["value"]
            values = value if isinstance(value, list) else [value]
            shown = " ".join("none" if number is None else f"{number:.6g}" for number in values)
            lines.append(f"  {metric:26} {shown:12} N = {compared_numbers(entry['protocol'])}")
            if "note" in entry:
                notes.setdefault(entry["note"], []).append(metric)
        lines += [f"  {', '.join(names)}: {note}" for note, names in notes.items()]
    return "\n".join(lines)


def _run() -> None:
    config = parse_options(EvaluateConfig, "pipelines.evaluate")
    results = evaluate(config)
    announce(table(results))
    if config.folders is not None:
        protocol = next(iter(results["folders"].values()))["protocol"]
        announce("protocol " + json.dumps(protocol, indent=2))
    elif config.run_dir is not None and config.output_dir is None:
        renew_summary(config.run_dir, config.data_root, config.data_validation_root)


def main() -> None:
    """Runs the command line."""
    run_command(_run, "lower batch-size, or num-images if that does not help")


if __name__ == "__main__":
    main()
