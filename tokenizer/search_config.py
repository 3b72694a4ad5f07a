"""Parameters of the search for codes."""

from typing import Annotated

from pydantic import Field

from tokenizer.fields import Factor
from tokenizer.storage.configs import StrictConfig


class SearchConfig(StrictConfig):
    """How codes are chosen by what they draw and what they cost; see `tokenizer/search.py`."""

    candidates: Annotated[int, Field(ge=1, le=4096)] = 12
    """Codes, or stacks of residual codes, tried at each position, the present one among them; 1
    leaves the encoder's."""
    sweeps: Annotated[int, Field(ge=1, le=1000)] = 1
    """Times that every position is visited."""
    beam: Annotated[int, Field(ge=1, le=4096)] = 32
    """Stacks kept while the candidates are put together layer by layer."""
    rate_weight: Factor = 0.0
    """Weight μ of the code length against the error; above 0 something must give code lengths."""
    decoder_variance: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Variance of the decoder, on [-1, 1], which sets the price of an error; None: the mean squared
    error of the image from the encoder's codes."""

    @property
    def is_on(self) -> bool:
        """Whether there is anything to try."""
        return self.candidates > 1


NO_SEARCH = SearchConfig(candidates=1)
"""The encoder's codes as they are."""
