"""What the model folders of strangers have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MARKER = "executed"
"""Name of the file that a pickle leaves in the folder if it is ever executed."""


class Crafted(NamedTuple):
    """What was done to a model folder."""

    description: str
    is_valid: bool = False
    """Whether it may be loaded, the damage being one that no reader can see."""


Craft = Callable[[np.random.Generator, Path], Crafted]


def choose(generator: np.random.Generator, options: Any) -> Any:
    """One of the options, with its own type."""
    return options[int(generator.integers(len(options)))]
