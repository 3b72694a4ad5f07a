"""The run that fine-tunes the decoder of another: its configuration and command line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from pipelines.config import TokenizerRunConfig
from pipelines.options import HELP, parse_options, program_name
from pipelines.run.folder import first_difference, load_run
from tokenizer.storage.errors import InputError

STEPS_SHARE = 10
"""The tokenizer's steps over those of fine-tuning, by default."""
ADDED = {"head_width"}
"""Fields of the networks that fine-tuning may change: of the decoder alone."""


class DecoderRunConfig(TokenizerRunConfig):
    """Trains the decoder of a finished tokenizer further on hard codes, in RUN/decoder.

    The codes stay, and with them the prior. A finished fine-tuning is used wherever the run is;
    RUN/tokenizer is left as it is.
    """

    main_options: ClassVar[tuple[str, ...]] = (
        "data.root",
        "data.validation_root",
        "recipe.perceptual.weight",
        "recipe.perceptual.network",
        "recipe.perceptual.weights",
        "recipe.adversarial.weight",
        "tokenizer.networks.head_width",
        "training.total_steps",
        "training.batch_size",
        "training.learning_rate",
    )
    run_dir: Annotated[Path, tyro.conf.Suppress]

    @property
    def output_dir(self) -> Path:
        """Folder of the fine-tuning."""
        return self.run_dir / "decoder"


def decoder_run(run_dir: Path) -> DecoderRunConfig:
    """The fine-tuning of a run: its images, batches, rate and precision, and fewer steps.

    Raises:
        InputError: it has no tokenizer.
    """
    path = run_dir / "tokenizer" / "config.json"
    if not path.is_file():
        raise InputError(f"RUN must be the folder of a run with a tokenizer: there is no {path}")
    run = load_run(TokenizerRunConfig, path)
    training = run.training
    steps = max(training.total_steps // STEPS_SHARE, 1)
    update = {
        "total_steps": steps,
        "warmup_steps": min(training.warmup_steps, steps // 10),
        "extended_at": (),
    }
    # The discriminator is new; a short run cannot wait for it as long as the tokenizer's did.
    adversarial = run.recipe.adversarial
    lead_steps = min(adversarial.lead_steps, steps // 5)
    start = {"start_step": 0, "lead_steps": lead_steps}
    recipe = {"adversarial": adversarial.model_copy(update=start)}
    fields = {name: getattr(run, name) for name in type(run).model_fields}
    fields |= {
        "run_dir": run_dir,
        "training": training.model_copy(update=update),
        "recipe": run.recipe.model_copy(update=recipe),
        "backbone_weights": None,
        "initialize_from": None,
    }
    return DecoderRunConfig(**fields)


def check_networks(config: DecoderRunConfig) -> None:
    """Compares the tokenizer with that of the run.

    Raises:
        InputError: more is to change than its decoder.
    """
    saved = load_run(TokenizerRunConfig, config.tokenizer_dir / "config.json").tokenizer
    before = saved.networks
    if before.head_width not in (0, config.tokenizer.networks.head_width):
        raise InputError(
            f"tokenizer.networks.head_width must be {before.head_width}, that of the run, "
            f"got {config.tokenizer.networks.head_width}"
        )
    added = {name: getattr(config.tokenizer.networks, name) for name in ADDED}
    saved = saved.model_copy(update={"networks": before.model_copy(update=added)})
    difference = first_difference(
        saved.model_dump(mode="json"), config.tokenizer.model_dump(mode="json"), "tokenizer."
    )
    if difference:
        raise InputError(f"{config.tokenizer_dir} is left as it is: {difference}")
    for name in ("backbone_weights", "initialize_from"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} must be None: fine-tuning begins with the run's tokenizer")


def parse_decoder_run(command: str, arguments: Sequence[str] | None = None) -> DecoderRunConfig:
    """Reads `RUN --section.option value ...`; RUN may be the path of a saved config.json.

    Raises:
        InputError: RUN is no run, or an option is unknown or out of range.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        raise InputError(
            f"Missing from {program_name(command)}: RUN, the folder of a run with a trained "
            "tokenizer, or a saved config.json"
        )
    if given[0] in HELP:
        program, purpose = program_name(command), (DecoderRunConfig.__doc__ or "").split("\n\n")
        print(
            f"usage: {program} RUN [--option value ...]\n\n{purpose[0]}\n\n"
            "RUN is the folder of a run with a trained tokenizer, or a saved config.json.\n\n"
            f"Options with the values of a run: {program} RUN --help"
        )
        raise SystemExit(0)
    name, *overrides = given
    path = Path(name)
    base = load_run(DecoderRunConfig, path) if name.endswith(".json") else decoder_run(path)
    config = parse_options(DecoderRunConfig, f"{command} {name}", overrides, base)
    check_networks(config)
    return config
