"""Conditions on a command line: texts, attributes, or rows of a file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.condition_inputs import attributes_of_text
from pipelines.data.embeddings import open_embeddings
from pipelines.data.folder_scan import printable
from prior import AttributeConditionConfig, EmbeddingConditionConfig, PriorConfig, Tokens
from tokenizer.storage.errors import InputError


class GivenConditions(NamedTuple):
    """Conditions to be taken in turn."""

    entries: list[Any] | Tensor | Tokens
    """As `ImageGenerationPipeline` takes them."""
    described: list[dict[str, Any]]
    """JSON values for people, under the names of columns."""
    file_hash: str = ""
    """SHA-256 of the file that they come from."""

    def take(self, numbers: Sequence[int]) -> list[Any] | Tensor | Tokens:
        """The conditions of these images."""
        rows = [number % len(self.described) for number in numbers]
        if isinstance(self.entries, list):
            return [self.entries[row] for row in rows]
        return self.entries[torch.tensor(rows, dtype=torch.int64)]


def read_given(words: Sequence[str], prior: PriorConfig) -> GivenConditions | None:
    """Conditions for a prior as words: texts, `name=value,name=value`, or a file and its rows.

    Raises:
        InputError: they do not suit the prior.
    """
    if not words:
        return None
    condition = prior.condition
    if isinstance(condition, AttributeConditionConfig):
        entries = [attributes_of_text(word, condition) for word in words]
        return GivenConditions(list(entries), entries)
    if not isinstance(condition, EmbeddingConditionConfig):
        raise InputError(f"condition must be empty for this prior, got {words[0]!r}: give labels")
    if condition.text_encoder is not None:
        return GivenConditions(list(words), [{"text": word} for word in words])
    path = Path(words[0])
    if not path.is_file():
        raise InputError(f"condition: there is no file {printable(path)}")
    embeddings, mask = open_embeddings(path)
    rows = [_row(word, len(embeddings)) for word in words[1:]] or list(range(len(embeddings)))
    chosen: Tensor | Tokens = embeddings[rows]
    if mask is not None and isinstance(chosen, Tensor):
        chosen = Tokens(chosen, mask[rows])
    with path.open("rb") as file:
        file_hash = hashlib.file_digest(file, "sha256").hexdigest()
    return GivenConditions(chosen, [{"row": row} for row in rows], file_hash)


def _row(word: str, num_rows: int) -> int:
    if not word.isdecimal() or int(word) >= num_rows:
        raise InputError(f"condition: a row must lie in [0, {num_rows}), got {word!r}")
    return int(word)
