"""Conditions as people give them: a text, a dictionary of attributes, an array."""

import functools
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from pipelines.text_encoders import HuggingFaceEncoder, TextEncoder, encode_texts
from prior import (
    AttributeConditionConfig,
    EmbeddingConditionConfig,
    PriorConfig,
    TextEncoderConfig,
    Tokens,
)
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

MOST_NAMED = 20

Attributes = Mapping[str, Any]
"""By name a value, several in a list, or None to leave it open."""


class ConditionReader:
    """Makes what a prior's conditioner takes of what people give.

    Args:
        prior: of the prior.
        text_encoder: the one that it was trained with, or where it lies now; None: where it lay.
            It is loaded at the first text.
    """

    def __init__(
        self, prior: PriorConfig, text_encoder: TextEncoder | str | Path | None = None
    ) -> None:
        self._condition = prior.condition
        self._text_encoder: TextEncoder | None = None
        if isinstance(self._condition, EmbeddingConditionConfig) and self._condition.text_encoder:
            self._text_encoder = SavedEncoder(self._condition.text_encoder, text_encoder)
        elif text_encoder is not None:
            raise InputError("text_encoder must be None: this prior was not trained on texts")

    def read(self, condition: Any, count: int) -> Any:
        """Rows for `count` images; what the built-in conditioners do not know is left as it is.

        Raises:
            InputError: it does not fit the prior.
        """
        if isinstance(self._condition, AttributeConditionConfig):
            if isinstance(condition, Mapping | str):
                condition = [condition] * count
            if isinstance(condition, Sequence):
                _check_count(len(condition), count)
                entries = [self._attributes(entry) for entry in condition]
                return attribute_rows(entries, self._condition)
        elif isinstance(self._condition, EmbeddingConditionConfig):
            if isinstance(condition, str):
                condition = [condition] * count
            is_sequence = isinstance(condition, Sequence)
            if is_sequence and condition and all(isinstance(own, str) for own in condition):
                _check_count(len(condition), count)
                return self._read_texts(condition)
            return _embeddings(condition, count, self._condition)
        return condition

    def _attributes(self, entry: Any) -> Attributes:
        assert isinstance(self._condition, AttributeConditionConfig)
        if isinstance(entry, str):
            return attributes_of_text(entry, self._condition)
        if not isinstance(entry, Mapping):
            raise InputError(
                "condition must be a dictionary of attributes, or one for each image, got "
                f"{type(entry).__name__}"
            )
        return entry

    def _read_texts(self, texts: Sequence[str]) -> Tokens:
        assert isinstance(self._condition, EmbeddingConditionConfig)
        if self._text_encoder is None:
            raise InputError(
                "condition must be vectors or tokens: this prior was not trained on texts"
            )
        distinct = list(dict.fromkeys(texts))
        tokens = encode_texts(self._text_encoder, distinct, self._condition.num_tokens)
        if tokens.embeddings.shape[-1] != self._condition.dim:
            raise InputError(
                f"text_encoder must give {self._condition.dim} channels, got "
                f"{tokens.embeddings.shape[-1]}"
            )
        return tokens[torch.tensor([distinct.index(text) for text in texts])]


class SavedEncoder:
    """The encoder that a prior was trained with, loaded at the first text.

    Args:
        config: what the prior has saved of it.
        given: an encoder, or where it lies now; None: where it lay then.
    """

    def __init__(
        self, config: TextEncoderConfig, given: TextEncoder | str | Path | None = None
    ) -> None:
        self.source = config.source
        self._hash = config.content_hash
        self._given = given

    def content_hash(self) -> str:
        """Hash of the one that the prior was trained with."""
        return self._hash

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        given = self._given if self._given is not None else self.source
        if given == "":
            raise InputError(
                "text_encoder must be given: this prior was trained with one of the user's, "
                "ImageGenerationPipeline.from_pretrained(folder, text_encoder=...)"
            )
        encoder = HuggingFaceEncoder(str(given)) if isinstance(given, str | Path) else given
        if encoder.content_hash() != self._hash:
            raise InputError(
                "text_encoder must be the one that this prior was trained with, whose hash is "
                f"{self._hash[:12]}, got {encoder.content_hash()[:12]}"
            )
        return encoder

    def __call__(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """Its tokens.

        Raises:
            InputError: it cannot be loaded, or is another one.
        """
        return self._encoder(texts, max_tokens)


def attribute_rows(
    entries: Sequence[Attributes], config: AttributeConditionConfig
) -> Int8[Tensor, "batch values"]:
    """What `AttributeConditioner` takes; an attribute that is not given is left open.

    Raises:
        InputError: there is no such attribute or value.
    """
    first, start = {}, 0
    for attribute in config.attributes:
        first[attribute.name] = start
        start += len(attribute.values)
    places = {
        own.name: {value: first[own.name] + place for place, value in enumerate(own.values)}
        for own in config.attributes
    }
    rows = np.full((len(entries), config.num_values), -1, np.int8)
    for row, entry in zip(rows, entries, strict=True):
        for name, given in entry.items():
            if name not in places:
                raise InputError(f"condition: no attribute is called {name!r}, {_named(places)}")
            values = attribute_values(given)
            if values is None:
                continue
            own = places[name]
            row[first[name] : first[name] + len(own)] = 0
            for value in values:
                if value not in own:
                    raise InputError(f"condition: {name} cannot be {value!r}, {_named(own)}")
                row[own[value]] = 1
    return torch.from_numpy(rows)


def attributes_of_text(text: str, config: AttributeConditionConfig) -> dict[str, str | list[str]]:
    """Attributes as `name=value,name=value`; a value alone is that of the attribute that has it.

    Raises:
        InputError: none or several have it.
    """
    entry: dict[str, str | list[str]] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not sign:
            names = [own.name for own in config.attributes if part in own.values]
            if len(names) != 1:
                found = " or ".join(f"{name}={part}" for name in names)
                first = f"{config.attributes[0].name}={config.attributes[0].values[0]}"
                raise InputError(
                    "condition must be name=value,name=value, such as "
                    f"{shortened(found or first)}, got {shortened(part)!r}, a value of "
                    f"{'several attributes' if names else 'no attribute'}"
                )
            name, value = names[0], part
        others = attribute_values(entry.get(name)) or []
        entry[name] = [*others, value] if others else value
    return entry


def attribute_values(given: Any) -> list[str] | None:
    """Values as text; None where it is left open, as an empty cell of a table does."""
    if given is None or given == "":
        return None
    if isinstance(given, list | tuple | set):
        return [_as_text(value) for value in given]
    return [_as_text(given)]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | Real):
        raise InputError(f"condition: a value must be a text or a number, got {value!r}")
    return str(value)


def _embeddings(
    condition: Any, count: int, config: EmbeddingConditionConfig
) -> Tensor | Tokens | None:
    """A row per image, of one that is for all or of one for each; tokens with a mask."""
    if condition is None or isinstance(condition, Tokens):
        tokens = condition
    else:
        try:
            values = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"condition must be an array of vectors or tokens, got {type(condition).__name__}"
            ) from error
        if values.ndim == (2 if config.num_tokens else 1):
            values = values.expand(count, *values.shape)
        if not config.num_tokens or values.ndim != 3:
            return values
        tokens = Tokens(
            values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        )
    if tokens is None or tokens.embeddings.shape[1] >= config.num_tokens:
        return tokens
    missing = config.num_tokens - tokens.embeddings.shape[1]
    return Tokens(
        nn.functional.pad(tokens.embeddings, (0, 0, 0, missing)),
        nn.functional.pad(tokens.mask, (0, missing)),
    )


def _check_count(found: int, count: int) -> None:
    if found != count:
        raise InputError(
            f"condition must have one row for {count} images, got {found}; what is for all of "
            "them needs no list"
        )


def _named(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join(shortened(name) for name in list(names)[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"there are {shown}{more}"
