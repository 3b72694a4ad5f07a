"""Code indices of a picture to bytes and back, by a tokenizer."""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from pipelines.coding.layout import Header, pack, unpack
from pipelines.coding.probabilities import (
    Counts,
    OwnPrior,
    Probabilities,
    StoredCounts,
    same_sums,
)
from pipelines.coding.stream import StreamReader, StreamWriter
from pipelines.marginals import Marginals
from tokenizer import Tokenizer
from tokenizer.fields import MAX_MAP_SIDE
from tokenizer.storage.errors import InputError

MAX_PIXELS = 2**26
"""Width times height, as of a picture that is read."""
PREFERRED = ("own", "marginals", "counts")
"""Models, of which the first that there is is taken: those that are fast at any size."""


class CodedPicture(NamedTuple):
    """What a file holds."""

    indices: list[Int[Tensor, "1 _ _ _"]]
    """Of the padded picture, coarse to fine; 0 in layers that the file lacks."""
    num_layers: int
    """Layers that it has."""
    width: int
    """Of the picture, in pixels."""
    height: int


class Codec:
    """Writes and reads by one tokenizer, whose weights must not change meanwhile.

    Args:
        tokenizer: the tokenizer.
        marginals: how often its codes come, for the model "marginals".
        prior: gives what there is for the model "prior", when that is asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marginals: Marginals | None = None,
        prior: Callable[[], Probabilities] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._identity = tokenizer.identity_hash()
        self._makers: dict[str, Callable[[], Probabilities]] = {
            "counts": lambda: Counts(tokenizer.codebook_sizes)
        }
        own = tokenizer.code_prior
        if own is not None:
            self._makers["own"] = lambda: OwnPrior(own, tokenizer.top_down)
        if marginals is not None:
            self._makers["marginals"] = lambda: StoredCounts(marginals)
        if prior is not None:
            self._makers["prior"] = prior
        self._made: dict[str, Probabilities] = {}

    def padded_size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of what the networks see: the next multiples that they take."""
        multiple = self.tokenizer.config.groups[0].downsampling
        return height + -height % multiple, width + -width % multiple

    def check_size(self, width: int, height: int, model: str) -> None:
        """Checks the size of a picture, before anything of that size is made.

        Raises:
            InputError: it has no pixels, too many, or others than the model knows.
        """
        longest = MAX_MAP_SIDE * self.tokenizer.config.groups[-1].downsampling
        padded = self.padded_size(width, height)
        if not 1 <= width * height <= MAX_PIXELS or max(padded) > longest:
            raise InputError(
                f"a picture must have 1 to {MAX_PIXELS:,} pixels and sides of at most "
                f"{longest:,}, got {width} by {height}"
            )
        known = self._probabilities(model).code_maps
        if known is not None and known != self.tokenizer.code_maps(*padded):
            multiple = self.tokenizer.config.groups[0].downsampling
            size = f"{known[0].width * multiple} by {known[0].height * multiple}"
            raise InputError(
                f"a picture must have {size} pixels for the model {model!r}, or up to "
                f"{multiple - 1} less, got {width} by {height}"
            )

    def check_model(self, model: str | None) -> str:
        """The model that is asked for, or the one that is taken where none is.

        Raises:
            InputError: the tokenizer has none such.
        """
        if model is None:
            return next(name for name in PREFERRED if name in self._makers)
        if model not in self._makers:
            known = " or ".join(map(repr, self._makers))
            raise InputError(f"model must be {known} for this tokenizer, got {model!r}")
        self._probabilities(model)
        return model

    def encode(
        self,
        indices: Sequence[Int[Tensor, "1 _ _ _"]],
        width: int,
        height: int,
        model: str | None = None,
    ) -> bytes:
        """A file.

        Args:
            indices: of the padded picture, as `Tokenizer.encode` gives them.
            width: of the picture, in pixels.
            height: likewise.
            model: of the probabilities, see `MODELS`; None: the first of `PREFERRED`.

        Raises:
            InputError: no such model, or a picture that it does not take.
        """
        model = self.check_model(model)
        self.check_size(width, height, model)
        probabilities = self._probabilities(model)
        layers = [layer for group in indices for layer in group[0].cpu()]
        writer, ends, checks = StreamWriter(), [0], [0]
        parts = _parts(layers, probabilities.parts)
        with same_sums():
            for step in probabilities(self._empty(width, height)):
                if step.part == len(ends):  # the first one of the next part
                    ends.append(writer.num_bytes)
                    checks.append(_checksum(parts[step.part - 1], checks[-1]))
                own = layers[step.layer][step.positions]
                writer.write(own.numpy(), step.tables)
                step.codes[step.positions] = own
        content = writer.finish()
        ends = [min(end, len(content)) for end in ends]
        # A byte more where the last part needs none: a file without it would look the same.
        content = content.ljust(ends[-1] + 1, b"\0")
        header = Header(
            width,
            height,
            model,
            tuple(end - start for start, end in itertools.pairwise(ends)),
            tuple(check & 0xFFFF for check in checks[1:]),
            _checksum(parts[-1], checks[-1]),
        )
        return pack(header, self._identity_of(model) or "") + content

    def header(self, content: bytes) -> tuple[Header, int]:
        """The header of a file and the number of its bytes; nothing is decoded.

        Raises:
            InputError: it is wrong; see `unpack`.
        """
        header, start = unpack(content, self._identity_of)
        num_parts = len(self._probabilities(header.model).parts)
        if len(header.lengths) != num_parts - 1:
            raise InputError(f"content must have {num_parts} parts, got {len(header.lengths) + 1}")
        self.check_size(header.width, header.height, header.model)
        return header, start

    def decode(self, content: bytes) -> CodedPicture:
        """Reads a file, or what there is of one that was cut at the end of a part.

        Raises:
            InputError: it is no such file, cut elsewhere, damaged, of another tokenizer or version,
                or the probabilities are not the same to the last bit on this machine.
        """
        header, start = self.header(content)
        present = _num_present(header, len(content) - start)
        wanted = [*header.checks, header.crc]
        probabilities = self._probabilities(header.model)
        indices = self._empty(header.width, header.height)
        parts = _parts([layer for group in indices for layer in group[0]], probabilities.parts)
        reader, crc, done = StreamReader(content[start:]), 0, 0
        with same_sums():
            for step in probabilities(indices):
                if step.part > done:
                    crc = _checked(parts[done], crc, wanted, done)
                    done = step.part
                if done == present:
                    break
                step.codes[step.positions] = torch.from_numpy(reader.read(step.tables))
            else:
                _checked(parts[done], crc, wanted, done)
        num_layers = sum(probabilities.parts[:present])
        return CodedPicture(indices, num_layers, header.width, header.height)

    def _probabilities(self, model: str) -> Probabilities:
        if model not in self._made:
            self._made[model] = self._makers[model]()
        return self._made[model]

    def _identity_of(self, model: str) -> str | None:
        """What a file of this model depends on; None where there is no such model."""
        if model not in self._makers:
            return None
        return f"{self._identity} {self._probabilities(model).identity}".rstrip()

    def _empty(self, width: int, height: int) -> list[Tensor]:
        return [
            torch.zeros(1, own.depth, own.height, own.width, dtype=torch.int64)
            for own in self.tokenizer.code_maps(*self.padded_size(width, height))
        ]


def _parts(layers: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    """The layers of each part."""
    ends = [*itertools.accumulate(sizes)]
    return [layers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _num_present(header: Header, num_bytes: int) -> int:
    """Parts of a file with so many bytes after its header.

    Raises:
        InputError: it is cut within one.
    """
    ends = [*itertools.accumulate(header.lengths)]
    part = sum(end <= num_bytes for end in ends)
    if part and num_bytes == ends[part - 1]:
        return part
    if part < len(ends) or not num_bytes:
        raise InputError(f"content is cut within part {part + 1} of {len(ends) + 1}")
    return part + 1


def _checksum(layers: Sequence[Tensor], before: int) -> int:
    """CRC-32 of codes as 32-bit little-endian numbers, row by row, after those before."""
    for codes in layers:
        before = zlib.crc32(codes.numpy().astype("<u4").tobytes(), before)
    return before


def _checked(layers: Sequence[Tensor], before: int, wanted: Sequence[int], part: int) -> int:
    """The checksum of the codes up to those of a part.

    Raises:
        InputError: it is another one.
    """
    found = _checksum(layers, before)
    mask = 0xFFFFFFFF if part == len(wanted) - 1 else 0xFFFF
    if found & mask != wanted[part]:
        raise InputError(
            f"content is damaged or cut in part {part + 1} of {len(wanted)}, or written where "
            "other probabilities are computed"
        )
    return found
