"""Hashes of checkpoints: one entry in the header of the weights (safetensors shuffles several)."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic_core
import torch
from torch import Tensor

from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

_ENTRY = "sha256"


def hash_entry(
    config: str, weights: Mapping[str, Tensor], former: Sequence[str] = ()
) -> dict[str, str]:
    """The entry: hashes of config.json and weights, then those of earlier modules, if any."""
    return {_ENTRY: " ".join([_text_hash(config.encode()), weights_hash(weights), *former])}


def check_hashes(
    config_path: Path, weights_path: Path, metadata: Mapping[str, str], found: str
) -> tuple[str, ...]:
    """Compares what was read with what was saved; weights from elsewhere may have no hashes.

    Args:
        config_path: of the config.
        weights_path: of the weights, or of their index.
        metadata: what was saved with them.
        found: hash of the weights that were read.

    Returns:
        The hashes of earlier modules.

    Raises:
        InputError: either file is damaged.
    """
    if not metadata.keys() - {"format"}:
        return ()
    if _ENTRY not in metadata:
        names = shortened(", ".join(sorted(metadata)))
        raise InputError(f"{weights_path} must have {_ENTRY!r} or no metadata, got {names}")
    config_hash, _, hashes = metadata[_ENTRY].partition(" ")
    saved_hash, *former = hashes.split(" ")
    if saved_hash != found:
        raise InputError(f"{weights_path} is damaged: it does not match its own hash")
    if config_hash != _text_hash(config_path.read_bytes()):
        raise InputError(f"{config_path} is damaged: it does not match the hash in {weights_path}")
    return tuple(former)


def _text_hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    _digest_weights(digest, weights)
    return digest.hexdigest()


def format_1_hash(name: str, fields: dict[str, Any], weights: Mapping[str, Tensor]) -> str:
    """The hash of version 0.1, which covered class and config, too."""
    digest = hashlib.sha256(name.encode())
    with contextlib.suppress(pydantic_core.PydanticSerializationError):  # half a character, say
        digest.update(pydantic_core.to_json(fields))
    _digest_weights(digest, weights)
    return digest.hexdigest()


def _digest_weights(digest: "hashlib._Hash", weights: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
