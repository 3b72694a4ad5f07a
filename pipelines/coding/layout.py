"""The bytes before the codes of a compressed picture: what they say, and that they say it whole."""

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tokenizer.storage.errors import InputError

MAGIC = b"HQ"
VERSION = 2
SUFFIX = ".hq"
MAX_BYTES = 2**28
MODELS = ("counts", "own", "marginals", "prior")
"""Where the probabilities of codes come from, by number: see `probabilities.py`."""
_NUM_MODELS = {1: 2, VERSION: len(MODELS)}
"""That there were, by version."""
_FIXED = len(MAGIC) + 1 + 4
_MAX_PARTS = 2**10
_LONGEST_NUMBER = 5
_STRANGE = "content is damaged in its header, or of another tokenizer"


class Header(NamedTuple):
    """What is known of a picture before its codes are read."""

    width: int
    height: int
    model: str
    """One of `MODELS`."""
    lengths: tuple[int, ...]
    """Of each part but the last: bytes after which it can be read, less those of the part before.
    A part is a layer, or what `model` codes together."""
    checks: tuple[int, ...]
    """Of each of these parts, 16 bits of the CRC-32 of all codes up to its end."""
    crc: int
    """CRC-32 of all codes."""


def pack(header: Header, identity: str) -> bytes:
    """The bytes; `identity` stands for the tokenizer and decides with them on the tag."""
    num_parts = len(header.lengths) + 1
    field = num_parts * len(MODELS) + MODELS.index(header.model)
    numbers = (header.width, header.height, field, *header.lengths)
    rest = b"".join(map(_packed, numbers))
    rest += struct.pack(f"<{len(header.checks)}HI", *header.checks, header.crc)
    return MAGIC + bytes([VERSION]) + struct.pack("<I", _tag(rest, identity)) + rest


def unpack(content: bytes, identity_of: Callable[[str], str | None]) -> tuple[Header, int]:
    """The header, checked, and the number of its bytes.

    Args:
        content: of the file.
        identity_of: as `pack` takes it, of a model; None where there is no such model.

    Raises:
        InputError: it is none, cut, damaged, of a later version, or of another tokenizer.
    """
    width, height, num_parts, model, numbers = _start(content)
    if not 1 <= num_parts <= _MAX_PARTS:
        raise InputError(_STRANGE)
    lengths = tuple(next(numbers) for _ in range(num_parts - 1))
    end = numbers.place + 2 * (num_parts - 1) + 4
    if len(content) < end:
        raise InputError(f"content is cut within its header, after {len(content)} bytes")
    *checks, crc = struct.unpack(f"<{num_parts - 1}HI", content[numbers.place : end])
    (tag,) = struct.unpack("<I", content[_FIXED - 4 : _FIXED])
    identity = identity_of(model)
    if identity is None:
        raise InputError(f"{_STRANGE}: this one has no {model!r}")
    if tag != _tag(content[_FIXED:end], identity):
        raise InputError(_STRANGE)
    return Header(width, height, model, lengths, tuple(checks), crc), end


def model_of(content: bytes) -> str:
    """Where the probabilities of a file come from, as it says; nothing is checked by its tag.

    Raises:
        InputError: it is none, cut, or of a later version.
    """
    return _start(content)[3]


def _start(content: bytes) -> tuple[int, int, int, str, "_Numbers"]:
    """Width, height, number of parts, model, and the numbers that follow."""
    if len(content) > MAX_BYTES:
        raise InputError(f"content must have at most {MAX_BYTES:,} bytes, got {len(content):,}")
    if content[: len(MAGIC)] != MAGIC:
        raise InputError("content must be a picture compressed by this program: it is none")
    if len(content) < _FIXED:
        raise InputError(f"content is cut within its header, after {len(content)} bytes")
    version = content[len(MAGIC)]
    if version not in _NUM_MODELS:
        raise InputError(
            f"content must be of version {VERSION} or before, got {version}: "
            + ("a later version wrote it" if version > VERSION else "it is damaged")
        )
    numbers = _Numbers(content)
    width, height, field = (next(numbers) for _ in range(3))
    num_parts, number = divmod(field, _NUM_MODELS[version])
    return width, height, num_parts, MODELS[number], numbers


class _Numbers(Iterator[int]):
    """Numbers of seven bits a byte, low ones first; the eighth says that more follow."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, _FIXED

    def __next__(self) -> int:
        value = 0
        for position in range(_LONGEST_NUMBER):
            if self.place >= len(self.content):
                raise InputError(f"content is cut within its header, after {self.place} bytes")
            byte = self.content[self.place]
            self.place += 1
            value |= (byte & 127) << (7 * position)
            if byte < 128:
                return value
        raise InputError(_STRANGE)


def _packed(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(128 | number & 127)
        number >>= 7
    return bytes([*parts, number])


def _tag(rest: bytes, identity: str) -> int:
    return zlib.crc32(rest, zlib.crc32(identity.encode()))
