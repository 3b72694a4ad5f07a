"""The commands: what each is for, and how its command line is read before anything is imported."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipelines.command_configs import (
    AppConfig,
    CheckDataConfig,
    DemoConfig,
    EvaluateConfig,
    ExplainConfig,
    GenerateConfig,
    QuickstartConfig,
    ReconstructConfig,
    SummaryConfig,
)
from pipelines.config import RunConfig
from pipelines.decoder_run import parse_decoder_run
from pipelines.options import fail, parse_options, parse_run
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from tokenizer.storage.configs import StrictConfig
from tokenizer.storage.errors import InputError


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
    "evaluate": Verb("measures reconstructions and generated images", EvaluateConfig),
    "summary": Verb("writes a page about a run, during training too", SummaryConfig),
    "explain": Verb("writes a page about what the codes of a run mean", ExplainConfig),
    "app": Verb("shows a page in a browser on which to play with a run", AppConfig),
    "check-data": Verb("says what training will do with each file of a folder", CheckDataConfig),
    "demo": Verb("trains, draws and measures on procedural shapes, in a few minutes", DemoConfig),
}


def check_command_line(verb: str) -> None:
    """Prints the help that is asked for, or what is wrong, and exits; otherwise does nothing."""
    command = f"pipelines.{verb.replace('-', '_')}"
    takes = VERBS[verb].takes
    try:
        if isinstance(takes, Mapping):
            parse_run(takes, command)
        elif isinstance(takes, type):
            parse_options(takes, command)
        else:
            takes(command)
    except InputError as error:
        fail(str(error))
