"""Image tokenizer: images to code indices and back."""

from tokenizer.builders import fsq_vae, hq_vae, rq_vae, rsq_vae, sq_vae, sq_vae_2, vq_vae, vq_vae_2
from tokenizer.config import CodeMapConfig, TokenizerConfig
from tokenizer.model import Tokenizer
from tokenizer.objective import EvidenceLowerBound, TokenizerOutput
from tokenizer.quantizers import GroupConfig, Quantizer, QuantizerOutput
from tokenizer.storage.errors import InputError

__all__ = [
    "CodeMapConfig",
    "EvidenceLowerBound",
    "GroupConfig",
    "InputError",
    "Quantizer",
    "QuantizerOutput",
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
