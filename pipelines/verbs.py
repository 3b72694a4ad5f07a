"""The commands: what each is for, and how its command line is read before anything is imported."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.class_labels import class_number
from pipelines.command_configs import (
    CheckDataConfig,
    CompressConfig,
    DecompressConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    QuickstartConfig,
    ReconstructConfig,
)
from pipelines.config import PriorRunConfig, RunConfig, TokenizerRunConfig
from pipelines.data.folder_listing import check_any_image, split_folders, training_folder
from pipelines.data_config import IN_FOLDERS
from pipelines.decoder_run import parse_decoder_run
from pipelines.index_config import IndexShardsConfig
from pipelines.options import fail, parse_options, parse_run
from pipelines.page_configs import AppConfig, ExplainConfig, SummaryConfig
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.run.folder import check_extension, check_trained_tokenizer
from pipelines.score_config import ScoreConfig
from pipelines.tuning_config import TuneSamplingConfig
from prior.config import PriorConfig
from tokenizer.storage.configs import StrictConfig, validate_fields
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import read_json, shortened


class Verb(NamedTuple):
    """A command."""

    summary: str
    takes: type[StrictConfig] | Mapping[str, RunConfig] | Callable[[str], RunConfig]
    """The class of its config, the presets, one of which it takes first, or what reads them."""


VERBS = {
    "quickstart": Verb(
        "trains, draws and measures on a folder of images, in given minutes", QuickstartConfig
    ),
    "train-tokenizer": Verb("trains a tokenizer on images (stage one)", TOKENIZER_PRESETS),
    "finetune-decoder": Verb(
        "trains the decoder of a run further, while its codes stay", parse_decoder_run
    ),
    "train-prior": Verb(
        "trains a prior over the codes of that tokenizer (stage two)", PRIOR_PRESETS
    ),
    "generate": Verb("draws images from a trained run", GenerateConfig),
    "reconstruct": Verb("encodes images and decodes them again", ReconstructConfig),
    "compress": Verb("writes images as files of a few bytes, by their codes", CompressConfig),
    "decompress": Verb("writes the images of such files", DecompressConfig),
    "evaluate": Verb("measures reconstructions and generated images", EvaluateConfig),
    "tune-sampling": Verb(
        "chooses temperature, guidance and top-p by the training images", TuneSamplingConfig
    ),
    "summary": Verb("writes a page about a run, during training too", SummaryConfig),
    "explain": Verb("writes a page about what the codes of a run mean", ExplainConfig),
    "score": Verb("says how unusual images are to a run, with a page", ScoreConfig),
    "app": Verb("shows a page in a browser on which to play with a run", AppConfig),
    "check-data": Verb("says what training will do with each file of a folder", CheckDataConfig),
    "index-shards": Verb(
        "finds the images in tar shards, which training then reads", IndexShardsConfig
    ),
    "demo": Verb("trains, draws and measures on procedural shapes, in a few minutes", DemoConfig),
}


def check_command_line(verb: str) -> None:
    """Prints the help that is asked for, or what is wrong, and exits; otherwise does nothing."""
    command = f"pipelines.{verb.replace('-', '_')}"
    takes = VERBS[verb].takes
    try:
        if isinstance(takes, Mapping):
            check_inputs(parse_run(takes, command))
        elif isinstance(takes, type):
            check_inputs(parse_options(takes, command))
        else:
            check_inputs(takes(command))
    except InputError as error:
        fail(str(error))


def check_inputs(config: StrictConfig) -> None:
    """Checks what is soon known: that runs, folders with images and files are there, and labels.

    Raises:
        InputError: one is not as it must be; its field is named.
    """
    for name in config.inputs:
        value: Any = functools.reduce(getattr, name.split("."), config)
        for path in value if isinstance(value, tuple) else (value,):
            if path is None or _may_be_elsewhere(config, name, path):
                continue
            if name == "run_dir" and not isinstance(config, AppConfig):
                check_trained_tokenizer(path)
            elif not os.path.exists(path):
                raise InputError(f"{name}: {shortened(str(path))} does not exist")
    if isinstance(config, TokenizerRunConfig) and config.data.dataset in ("folder", "files"):
        check_any_image(training_folder(config.data), "data.root")
        if config.data.validation_root is not None:
            check_any_image(config.data.validation_root, "data.validation_root")
    elif isinstance(config, QuickstartConfig):
        check_any_image(split_folders(config.folder)[0], "folder")
    elif isinstance(config, ReconstructConfig) and config.images.is_dir():
        check_any_image(config.images, "images")
    elif isinstance(config, GenerateConfig) and config.labels:
        _check_labels(config)
    if isinstance(config, TokenizerRunConfig | PriorRunConfig):
        check_extension(config)


def _check_labels(config: GenerateConfig) -> None:
    folder = config.run_dir / "prior"
    path = (folder / "model" if (folder / "model").is_dir() else folder) / "config.json"
    fields = read_json(path)
    if isinstance(fields, dict):  # otherwise the config is refused; networks may be of old formats
        wanted = PriorConfig.model_fields.keys() - {"network"}
        fields = {name: fields[name] for name in wanted & fields.keys()}
    prior = validate_fields(PriorConfig, fields, str(path))
    for label in config.labels:
        class_number(label, prior)


def _may_be_elsewhere(config: StrictConfig, name: str, path: Path | str) -> bool:
    """Whether it may be a run of the hub, a data set that is downloaded, or no path at all."""
    if isinstance(config, AppConfig):
        return name == "run_dir" and str(path).count("/") == 1
    if isinstance(config, TokenizerRunConfig):
        return name.startswith("data.") and config.data.dataset not in IN_FOLDERS
    return not isinstance(path, Path)  # a word, such as "train" for what a run is compared with
