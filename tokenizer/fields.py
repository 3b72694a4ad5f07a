"""Bounded types of config fields.

Bounds that no sound model reaches, so that a config cannot ask for absurd amounts of memory or for
numbers that leave float32.
"""

from numbers import Integral
from typing import Annotated, Any

from pydantic import Field

from tokenizer.storage.errors import InputError

Share = Annotated[float, Field(ge=0, le=1)]
ProperShare = Annotated[float, Field(ge=0, lt=1)]
Width = Annotated[int, Field(gt=0, le=2**14)]
Depth = Annotated[int, Field(gt=0, le=64)]
Downsampling = Annotated[int, Field(gt=0, le=1024)]
MAX_MAP_SIDE = 4096
MapSide = Annotated[int, Field(gt=0, le=MAX_MAP_SIDE)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6)]
PositiveFactor = Annotated[float, Field(ge=1e-6, le=1e6)]
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)]
CodebookSizes = Annotated[
    tuple[Annotated[int, Field(gt=0, le=2**20)], ...], Field(min_length=1, max_length=64)
]
# From 1002 levels on, the widened tanh of finite scalar quantization would leave the grid.
GridLevels = Annotated[
    tuple[Annotated[int, Field(ge=2, le=512)], ...], Field(min_length=1, max_length=20)
]


def check_whole(name: str, value: Any, least: int = 0) -> None:
    """Checks an argument that is no config field.

    Raises:
        InputError: it is no whole number, or below `least`.
    """
    if not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if int(value) < least:
        raise InputError(f"{name} must be >= {least}, got {value}")
