"""Captions, encoded once: tokens of each distinct one, and where there are some."""

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.data.cache import delete_and_start_again, open_array, open_entry, write_entry
from pipelines.data.dataset import ImageDataset
from pipelines.data.decoded_images import write_header
from pipelines.text_encoders import TextEncoder, tokens_of
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, naming

logger = logging.getLogger(__name__)

_TEXTS_AT_A_TIME = 64


class EncodedTexts(NamedTuple):
    """Tokens of some texts, one after the other."""

    values: Tensor
    """(tokens of all texts, dim), float16, on the disk."""
    first: np.ndarray
    """(texts,): row of the first token of each."""
    mask: Tensor
    """(texts, tokens of the longest)."""


def captions_of_source(
    train: ImageDataset, validation: ImageDataset
) -> tuple[list[list[str]], dict[str, str]] | None:
    """Captions of both splits and their hashes by name, if the source of the images has some."""
    if not (hasattr(train, "captions") and hasattr(validation, "captions")):
        return None
    texts = {"training": train.captions(), "validation": validation.captions()}
    hashes = {
        f"{name} conditions": hashlib.sha256(json.dumps(own).encode()).hexdigest()
        for name, own in texts.items()
    }
    return list(texts.values()), hashes


def encode_captions(
    texts: Sequence[str],
    encoder: TextEncoder,
    max_tokens: int,
    cache_dir: Path,
    device: torch.device,
) -> EncodedTexts:
    """Encodes distinct texts into `cache_dir`, or opens what an earlier run has left there.

    Raises:
        InputError: the encoder gives something else than tokens, or the entry is damaged.
    """
    key = json.dumps([encoder.content_hash(), max_tokens, list(texts)])
    folder = cache_dir / f"captions-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.tmp{uuid.uuid4().hex[:12]}")
        temporary.mkdir(parents=True)
        try:
            with naming(folder):
                _store(temporary, texts, encoder, max_tokens, device)
            if not folder.exists():
                temporary.rename(folder)
            flush_to_disk(cache_dir)
        finally:
            rmtree(temporary, ignore_errors=True)
    with delete_and_start_again(folder):
        shape = tuple(open_entry(folder)["tokens"])
        open_array(folder / "tokens.npy", np.float16, shape)
        lengths = np.array(open_array(folder / "lengths.npy", np.int64, (len(texts),)))
    num_full = int((lengths == max_tokens).sum())
    if num_full:
        logger.warning(
            "condition.max_tokens: %d captions have %d tokens; what is longer is cut",
            num_full,
            max_tokens,
        )
    mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths).unsqueeze(1)
    # Changes would stay in memory: torch has no arrays that are read-only.
    values = np.load(folder / "tokens.npy", mmap_mode="c")
    return EncodedTexts(torch.from_numpy(values), lengths.cumsum() - lengths, mask)


def _store(
    folder: Path,
    texts: Sequence[str],
    encoder: TextEncoder,
    max_tokens: int,
    device: torch.device,
) -> None:
    """Writes with plain writes: through a memory map, a full disk would kill the process."""
    if isinstance(encoder, nn.Module):
        encoder.to(device)
    lengths: list[int] = []
    dim = 0
    with (folder / "tokens.npy").open("wb") as file:
        for start in tqdm(
            range(0, len(texts), _TEXTS_AT_A_TIME), "captions", leave=False, disable=None
        ):
            for tokens in tokens_of(encoder, texts[start : start + _TEXTS_AT_A_TIME], max_tokens):
                if not lengths:
                    dim = tokens.shape[1]
                    write_header(file, np.float16, (0, dim))
                    start_of_data = file.tell()
                if tokens.shape[1] != dim:
                    raise InputError(
                        f"text_encoder must give {dim} channels, then {tokens.shape[1]}"
                    )
                file.write(np.ascontiguousarray(tokens.numpy()).tobytes())
                lengths.append(len(tokens))
        file.seek(0)
        write_header(file, np.float16, (sum(lengths), dim))
        assert file.tell() == start_of_data
    np.save(folder / "lengths.npy", np.array(lengths, np.int64))
    write_entry(folder, {"tokens": [sum(lengths), dim]})
