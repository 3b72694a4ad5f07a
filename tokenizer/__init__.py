"""Image tokenizer: images to code indices and back."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.builders import (
        fsq_vae,
        hq_vae,
        rq_vae,
        rsq_vae,
        sq_vae,
        sq_vae_2,
        vq_vae,
        vq_vae_2,
    )
    from tokenizer.config import CodeMapConfig, GroupConfig, TokenizerConfig
    from tokenizer.model import Tokenizer
    from tokenizer.objective import EvidenceLowerBound, TokenizerOutput
    from tokenizer.quantizers import Quantizer, QuantizerOutput
    from tokenizer.search import CodeCosts
    from tokenizer.search_config import SearchConfig
    from tokenizer.storage.errors import InputError

__all__ = [
    "CodeCosts",
    "CodeMapConfig",
    "EvidenceLowerBound",
    "GroupConfig",
    "InputError",
    "Quantizer",
    "QuantizerOutput",
    "SearchConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "fsq_vae",
    "hq_vae",
    "rq_vae",
    "rsq_vae",
    "sq_vae",
    "sq_vae_2",
    "vq_vae",
    "vq_vae_2",
]

_MODULES = {
    "CodeCosts": "search",
    "CodeMapConfig": "config",
    "EvidenceLowerBound": "objective",
    "GroupConfig": "config",
    "InputError": "storage.errors",
    "Quantizer": "quantizers",
    "QuantizerOutput": "quantizers",
    "SearchConfig": "search_config",
    "Tokenizer": "model",
    "TokenizerConfig": "config",
    "TokenizerOutput": "objective",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command line is read without torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'builders')}")
    return getattr(module, name)
