"""How a prior is best sampled, as `tune_sampling` found it: saved beside its weights."""

import functools
import logging
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipelines.sampling_config import GuidanceScale, Probability, SamplingConfig
from prior import Prior
from tokenizer.fields import Temperature
from tokenizer.storage.configs import StrictConfig, validate_fields
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json

logger = logging.getLogger(__name__)

FILE = "sampling.json"
TUNED = ("temperature", "top_p", "guidance_scale")


class TunedSampling(StrictConfig):
    """The settings that gave the least distance."""

    temperature: Temperature
    top_p: Probability | None
    guidance_scale: GuidanceScale
    prior_hash: str
    """Content hash of the prior: other weights want other settings."""
    protocol: dict[str, JsonValue]
    """Which distance, from which images, of how many."""

    @classmethod
    def load(cls, folder: Path, prior: Prior) -> "TunedSampling | None":
        """What was found for the prior in this folder, if anything was.

        What was found before the prior was trained further is left out with a warning.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        tuned = validate_fields(cls, read_json(path), str(path))
        if not prior.has_hash(tuned.prior_hash):
            logger.warning("%s is not used: it is of other weights, tune sampling again", path)
            return None
        return tuned

    def save(self, folder: Path) -> None:
        """Writes it atomically."""
        text = self.model_dump_json(indent=2) + "\n"
        replace_file(folder / FILE, functools.partial(Path.write_text, data=text))


def filled(
    sampling: SamplingConfig, tuned: TunedSampling | None, is_conditional: bool
) -> SamplingConfig:
    """What is not given, as tuned; without it, as the prior has learned it.

    Images without a condition cannot be guided, however the others were tuned.
    """
    found: dict[str, Any] = {"temperature": 1.0, "guidance_scale": 1.0}
    if tuned is not None:
        found = tuned.model_dump(include=set(TUNED))
        found |= {} if is_conditional else {"guidance_scale": 1.0}
    given = {name: value for name, value in sampling if value is not None}
    return sampling.model_copy(update=found | given)


def uses_tuned(sampling: SamplingConfig) -> bool:
    """Whether something is left to what was tuned."""
    return any(getattr(sampling, name) is None for name in TUNED)
