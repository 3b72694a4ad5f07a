"""Where models lie, and where they are to go."""

import logging
from pathlib import Path

import torch

from tokenizer import Tokenizer
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import read_json

logger = logging.getLogger(__name__)


def model_folder(folder: Path) -> Path:
    """The checkpoint of one stage: `folder` itself, or model/ of a run."""
    return folder / "model" if (folder / "model").is_dir() else folder


def tokenizer_folder(source: Path) -> Path:
    """The checkpoint of the first stage of a run or saved pipeline, or `source` itself."""
    inner = source / "tokenizer"
    return model_folder(inner if inner.is_dir() else source)


def load_tokenizer(
    source: Path, dtype: torch.dtype | None, quantizer: BuildQuantizer | None = None
) -> Tokenizer:
    """The tokenizer of a run, of a saved pipeline, or of a folder of its own.

    Of a run whose decoder has been fine-tuned it is the one with that decoder; RUN/tokenizer as
    `source` gives the original. `quantizer` builds quantizers from outside the package, if it has
    such.

    Raises:
        InputError: there is none, it is damaged, or its decoder was fine-tuned for other codes.
    """
    inner, tuned = source / "tokenizer", source / "decoder"
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(source), dtype, quantizer=quantizer)
    if not (tuned / "model").is_dir():
        return tokenizer
    if not is_finished(tuned):
        logger.warning("the decoder is the original one: %s is not finished", tuned)
        return tokenizer
    fine_tuned = Tokenizer.from_pretrained(tuned / "model", dtype, quantizer=quantizer)
    if fine_tuned.identity_hash() != tokenizer.identity_hash():
        raise InputError(
            f"{tuned} was fine-tuned for other codes than those of {inner}; move it away, "
            "and fine-tune anew if you like"
        )
    logger.info("the decoder is the fine-tuned one of %s", tuned)
    return fine_tuned


def is_finished(stage_dir: Path) -> bool:
    """Whether a run has done its last step in the folder of a stage.

    A model without state/ is a copy of what was for use.
    """
    done = steps_done(stage_dir)
    return (stage_dir / "model").is_dir() if done is None else done[0] == done[1]


def steps_done(stage_dir: Path) -> tuple[int, int] | None:
    """The step of the newest checkpoint in the folder of a stage, and the last step of its run.

    None for a copy without state/, which does not tell.
    """
    state = stage_dir / "state"
    if not state.exists():
        return None
    fields = read_json(stage_dir / "config.json")
    training = fields.get("training") if isinstance(fields, dict) else None
    steps = training.get("total_steps") if isinstance(training, dict) else None
    # Only whole checkpoints have such a name.
    names = [path.name.removeprefix("step_") for path in state.glob("step_*") if path.is_dir()]
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    return newest, steps if isinstance(steps, int) else -1


def check_device(device: object) -> None:
    """Checks a device by its name; None is the CPU.

    Raises:
        InputError: there is none such here.
    """
    try:
        named = torch.device("cpu" if device is None else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be such as 'cpu' or 'cuda:0', got {device!r}") from error
    try:
        torch.empty(0, device=named)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"device must be one of this machine, got {device!r}: {reason}") from error
