"""Parameters of the prior inside a tokenizer."""

from typing import Annotated, Literal

from pydantic import Field

from tokenizer.storage.configs import StrictConfig


class CodePriorConfig(StrictConfig):
    """Small convolutional heads that know how likely codes are; see `tokenizer/code_prior.py`."""

    width: Annotated[int, Field(ge=0, le=2**14)] = 0
    """Channels of the heads; 0: no prior."""
    num_passes: Literal[1, 4, 16] = 4
    """Parallel passes in which the codes of a layer become known, each given those before it."""
