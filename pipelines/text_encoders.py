"""What makes tokens of texts: a Hugging Face encoder, or any object like it."""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prior import Tokens
from tokenizer.storage.errors import InputError
from tokenizer.storage.hashes import weights_hash
from tokenizer.storage.json_files import shortened

logger = logging.getLogger(__name__)

MODELS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
}
"""Classes of `transformers` by the model type of a folder's config."""


@runtime_checkable
class TextEncoder(Protocol):
    """Makes tokens of a text; one of the user's needs no more than these.

    The tokens of a text must not depend on the others. If it is a `torch.nn.Module`, it is moved to
    the device on which many texts are encoded.
    """

    source: str
    """Local folder or name on the Hugging Face hub to load it from; empty if it is neither."""

    def content_hash(self) -> str:
        """SHA-256 over all that its tokens depend on, in hexadecimal digits."""

    def __call__(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """Tokens of at least one text, and where there are some: `max_tokens` of each at most."""


class HuggingFaceEncoder(nn.Module):
    """A CLIP text model or a T5 encoder with its tokenizer; needs `transformers`.

    Only JSON, safetensors and the tokenizer's own files are read; no code of a model is run.

    Args:
        source: Local folder, or name on the hub.

    Raises:
        InputError: `transformers` is not installed, there is no such encoder, or one of another
            kind.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        check_source(source)
        import transformers

        self.source = str(Path(source).absolute()) if Path(source).is_dir() else source
        try:
            with _quiet_hub():
                config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type not in MODELS:
                raise InputError(
                    f"text_encoder must be one of {', '.join(MODELS)}, got "
                    f"{shortened(repr(config.model_type))} in {shortened(source)}"
                )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, trust_remote_code=False
            )
            model_class = getattr(transformers, MODELS[config.model_type])
            model = model_class.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:  # InputError is a ValueError
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"text_encoder: {shortened(source)} cannot be loaded: {_first_line(error)}"
            ) from error
        self.model = model.eval().requires_grad_(False)
        text_config = getattr(config, "text_config", config)
        limits = [self.tokenizer.model_max_length]
        limits += [getattr(text_config, "max_position_embeddings", None) or limits[0]]
        self._most_tokens = min(limits)

    @functools.cached_property
    def _hash(self) -> str:
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(
            f"{weights_hash(self.model.state_dict())} {vocabulary}".encode()
        ).hexdigest()

    def content_hash(self) -> str:
        """SHA-256 over weights and vocabulary."""
        return self._hash

    @torch.inference_mode()
    def forward(
        self, texts: Sequence[str], max_tokens: int
    ) -> tuple[Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]]:
        """Last hidden states, and where there are tokens; longer texts are cut."""
        length = min(max_tokens, self._most_tokens)
        given: Any = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        hidden: Tensor = self.model(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state
        return hidden, given["attention_mask"].bool()


def check_source(source: str) -> None:
    """Checks, before anything is loaded, that `source` may be an encoder.

    Raises:
        InputError: it is neither a folder nor a name on the hub, or `transformers` is not
            installed.
    """
    is_name = source.count("/") < 2 and not source.startswith((".", "/", "~"))
    if not source or not (is_name or Path(source).is_dir()):
        raise InputError(
            f"text_encoder must be a folder or a name on the hub, got {shortened(source)!r}: "
            "there is no such folder"
        )
    try:
        import transformers as transformers
    except ImportError as error:
        raise InputError(
            "text_encoder: transformers is not installed: pip install -e '.[text]' in the clone"
        ) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hides the two lines of each try to reach the hub; the error at last says why it failed."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def encode_texts(encoder: TextEncoder, texts: Sequence[str], num_tokens: int) -> Tokens:
    """Tokens of each text, padded to `num_tokens`.

    One text at a time, so that none depends on the others to the last bit.

    Raises:
        InputError: the encoder gives something else.
    """
    rows = []
    for text in texts:
        (row,) = tokens_of(encoder, [text], num_tokens + 1)
        if len(row) > num_tokens:
            (row,) = tokens_of(encoder, [text], num_tokens)
            logger.warning(
                "condition: %s is cut to %d tokens, those of the longest caption in training",
                shortened(repr(text)),
                num_tokens,
            )
        rows.append(row.float())
    embeddings = [nn.functional.pad(row, (0, 0, 0, num_tokens - len(row))) for row in rows]
    lengths = torch.tensor([[len(row)] for row in rows])
    return Tokens(torch.stack(embeddings), torch.arange(num_tokens) < lengths)


def tokens_of(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> list[Tensor]:
    """The tokens (number, dim) of each text in float16, without padding, on the CPU.

    Raises:
        InputError: the encoder gives something else.
    """
    embeddings, mask = encoder(texts, max_tokens)
    shape = tuple(embeddings.shape)
    if len(shape) != 3 or shape[0] != len(texts) or not 0 < shape[1] <= max_tokens:
        raise InputError(
            f"text_encoder must give tokens ({len(texts)}, at most {max_tokens}, channels), got "
            f"{shape}"
        )
    if tuple(mask.shape) != shape[:2] or mask.dtype != torch.bool or not bool(mask.any(1).all()):
        raise InputError(
            f"text_encoder must give a boolean mask {shape[:2]} with a token in each row, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    rows = [
        own[is_token].half() for own, is_token in zip(embeddings.cpu(), mask.cpu(), strict=True)
    ]
    if not all(bool(row.isfinite().all()) for row in rows):
        raise InputError("text_encoder must give finite tokens within ±65504, got others")
    return rows


def _first_line(error: Exception) -> str:
    return shortened(next(iter(str(error).splitlines()), type(error).__name__))
