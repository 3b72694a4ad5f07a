"""Image tokenizer: images to code indices and back."""

from tokenizer.builders import hq_vae, rq_vae, rsq_vae, sq_vae, sq_vae_2, vq_vae, vq_vae_2
from tokenizer.config import CodeMapConfig, TokenizerConfig
from tokenizer.model import Tokenizer
from tokenizer.objective import EvidenceLowerBound, TokenizerOutput
from tokenizer.storage.errors import InputError

__all__ = [
    "CodeMapConfig",
    "EvidenceLowerBound",
    "InputError",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "hq_vae",
    "rq_vae",
    "rsq_vae",
    "sq_vae",
    "sq_vae_2",
    "vq_vae",
    "vq_vae_2",
]
