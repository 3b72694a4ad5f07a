"""How images are drawn."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError

from prior.config import MAX_GUIDANCE
from tokenizer.fields import Temperature
from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.errors import InputError

Probability = Annotated[float, Field(gt=0, le=1)]
GuidanceScale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]


class SamplingConfig(StrictConfig):
    """How codes are drawn from the prior; a number for all layers, or one per layer."""

    temperature: Temperature | tuple[Temperature, ...] | None = None
    """Divides the logits; below 1 gives likelier codes. None: as tuned for the prior, else 1."""
    top_k: PositiveInt | tuple[PositiveInt | None, ...] | None = None
    """Draw from so many of the likeliest codes only."""
    top_p: Probability | tuple[Probability | None, ...] | None = None
    """Draw from the smallest set of codes with this total probability only; 1 = all. None: as tuned
    for the prior, else all."""
    guidance_scale: GuidanceScale | None = None
    """Classifier-free guidance; 1 = off. None: as tuned for the prior, else 1."""

    @classmethod
    def checked(cls, **values: Any) -> "SamplingConfig":
        """Builds one from numbers or any sequences of them.

        Raises:
            InputError: a value is out of range.
        """
        for name, value in values.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                values[name] = tuple(value)
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(describe_validation_error(error)) from error
