"""How often each code comes in the training images: saved beside a tokenizer's weights."""

import functools
import hashlib
import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from tokenizer import Tokenizer
from tokenizer.storage.configs import StrictConfig, validate_fields
from tokenizer.storage.files import replace_file
from tokenizer.storage.json_files import read_json

logger = logging.getLogger(__name__)

FILE = "marginals.json"
Count = Annotated[int, Field(ge=0, lt=2**40)]


class Marginals(StrictConfig):
    """Counts of codes, wherever in an image they came."""

    counts: Annotated[tuple[tuple[Count, ...], ...], Field(min_length=1)]
    """Of each layer, coarse to fine, and each code."""
    tokenizer_hash: str
    """Identity of the tokenizer: others have other codes."""
    images: str
    """Fingerprint of the images."""
    num_images: Annotated[int, Field(gt=0)]
    """That were encoded."""

    @model_validator(mode="after")
    def _check(self) -> "Marginals":
        if not all(map(sum, self.counts)):
            raise ValueError("counts must not be all zero in a layer")
        return self

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> "Marginals | None":
        """What lies beside the weights of the tokenizer in this folder, if anything does.

        Counts of other codes are left out with a warning.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        found = validate_fields(cls, read_json(path), str(path))
        sizes = [len(counts) for counts in found.counts]
        if found.tokenizer_hash != tokenizer.identity_hash() or sizes != tokenizer.codebook_sizes:
            logger.warning("%s is not used: it is of other codes, move it away", path)
            return None
        return found

    def save(self, folder: Path) -> None:
        """Writes it atomically."""
        text = self.model_dump_json() + "\n"
        replace_file(folder / FILE, functools.partial(Path.write_text, data=text))

    def content_hash(self) -> str:
        """SHA-256 of the counts."""
        return hashlib.sha256(repr(self.counts).encode()).hexdigest()
