"""Where models lie, and where they are to go."""

from pathlib import Path

import torch

from tokenizer import Tokenizer
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError


def model_folder(folder: Path) -> Path:
    """The checkpoint of one stage: `folder` itself, or model/ of a run."""
    return folder / "model" if (folder / "model").is_dir() else folder


def load_tokenizer(
    source: Path, dtype: torch.dtype | None, quantizer: BuildQuantizer | None = None
) -> Tokenizer:
    """The tokenizer of a run, of a saved pipeline, or of a folder of its own.

    `quantizer` builds quantizers from outside the package, if it has such.

    Raises:
        InputError: there is none, or it is damaged.
    """
    inner = source / "tokenizer"
    folder = model_folder(inner if inner.is_dir() else source)
    return Tokenizer.from_pretrained(folder, dtype, quantizer=quantizer)


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
