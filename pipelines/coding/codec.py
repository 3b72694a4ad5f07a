"""Code indices of a picture to bytes and back, by a tokenizer."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from pipelines.coding.layout import Header, pack, unpack
from pipelines.coding.probabilities import Counts, OwnPrior, Step, same_sums
from pipelines.coding.stream import StreamReader, StreamWriter
from tokenizer import Tokenizer
from tokenizer.fields import MAX_MAP_SIDE
from tokenizer.storage.errors import InputError
from tokenizer.storage.hashes import weights_hash

MAX_PIXELS = 2**26
"""Width times height, as of a picture that is read."""


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
    """Writes and reads by one tokenizer, whose weights must not change meanwhile."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        identity, prior = tokenizer.identity_hash(), tokenizer.code_prior
        self._identities = {"counts": identity}
        self._models: dict[str, Callable[[Sequence[Tensor]], Iterator[Step]]] = {
            "counts": Counts(tokenizer.codebook_sizes)
        }
        if prior is not None:
            self._identities["own"] = f"{identity} {weights_hash(prior.state_dict())}"
            self._models["own"] = OwnPrior(prior, tokenizer.top_down)

    def padded_size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of what the networks see: the next multiples that they take."""
        multiple = self.tokenizer.config.groups[0].downsampling
        return height + -height % multiple, width + -width % multiple

    def check_size(self, width: int, height: int) -> None:
        """Checks the size of a picture, before anything of that size is made.

        Raises:
            InputError: it has no pixels, or too many.
        """
        longest = MAX_MAP_SIDE * self.tokenizer.config.groups[-1].downsampling
        if not 1 <= width * height <= MAX_PIXELS or max(self.padded_size(width, height)) > longest:
            raise InputError(
                f"a picture must have 1 to {MAX_PIXELS:,} pixels and sides of at most "
                f"{longest:,}, got {width} by {height}"
            )

    def check_model(self, model: str | None) -> str:
        """The model that is asked for, or the best one.

        Raises:
            InputError: the tokenizer has none such.
        """
        if model is None:
            return [*self._identities][-1]
        if model not in self._identities:
            known = " or ".join(map(repr, self._identities))
            raise InputError(f"model must be {known} for this tokenizer, got {model!r}")
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
            model: of the probabilities, "own" or "counts"; None: the tokenizer's own prior, or
                counts where it has none.

        Raises:
            InputError: no such model, or too many pixels.
        """
        model = self.check_model(model)
        self.check_size(width, height)
        layers = [layer for group in indices for layer in group[0].cpu()]
        writer, ends, checks = StreamWriter(), [0], [0]
        with same_sums():
            for step in self._models[model](self._empty(width, height)):
                if step.layer == len(ends):  # the first one of the next layer
                    ends.append(writer.num_bytes)
                    checks.append(_checksum(layers[step.layer - 1], checks[-1]))
                own = layers[step.layer][step.positions]
                writer.write(own.numpy(), step.tables)
                step.codes[step.positions] = own
        content = writer.finish()
        ends = [min(end, len(content)) for end in ends]
        # A byte more where the last layer needs none: a file without it would look the same.
        content = content.ljust(ends[-1] + 1, b"\0")
        header = Header(
            width,
            height,
            model,
            tuple(end - start for start, end in itertools.pairwise(ends)),
            tuple(check & 0xFFFF for check in checks[1:]),
            _checksum(layers[-1], checks[-1]),
        )
        return pack(header, self._identities[model]) + content

    def header(self, content: bytes) -> tuple[Header, int]:
        """The header of a file and the number of its bytes; nothing is decoded.

        Raises:
            InputError: it is wrong; see `unpack`.
        """
        header, start = unpack(content, self._identities)
        num_layers = len(self.tokenizer.codebook_sizes)
        if len(header.lengths) != num_layers - 1:
            raise InputError(
                f"content must have {num_layers} layers, got {len(header.lengths) + 1}"
            )
        self.check_size(header.width, header.height)
        return header, start

    def decode(self, content: bytes) -> CodedPicture:
        """Reads a file, or what there is of one that was cut at the end of a layer.

        Raises:
            InputError: it is no such file, cut elsewhere, damaged, of another tokenizer or version,
                or the probabilities are not the same to the last bit on this machine.
        """
        header, start = self.header(content)
        present = _num_present(header, len(content) - start)
        wanted = [*header.checks, header.crc]
        indices = self._empty(header.width, header.height)
        layers = [layer for group in indices for layer in group[0]]
        reader, crc, done = StreamReader(content[start:]), 0, 0
        with same_sums():
            for step in self._models[header.model](indices):
                if step.layer > done:
                    crc = _checked(layers[done], crc, wanted, done)
                    done = step.layer
                if done == present:
                    break
                step.codes[step.positions] = torch.from_numpy(reader.read(step.tables))
            else:
                _checked(layers[done], crc, wanted, done)
        return CodedPicture(indices, present, header.width, header.height)

    def _empty(self, width: int, height: int) -> list[Tensor]:
        return [
            torch.zeros(1, own.depth, own.height, own.width, dtype=torch.int64)
            for own in self.tokenizer.code_maps(*self.padded_size(width, height))
        ]


def _num_present(header: Header, num_bytes: int) -> int:
    """Layers of a file with so many bytes after its header.

    Raises:
        InputError: it is cut within one.
    """
    ends = [*itertools.accumulate(header.lengths)]
    layer = sum(end <= num_bytes for end in ends)
    if layer and num_bytes == ends[layer - 1]:
        return layer
    if layer < len(ends) or not num_bytes:
        raise InputError(f"content is cut within layer {layer + 1} of {len(ends) + 1}")
    return layer + 1


def _checksum(codes: Tensor, before: int) -> int:
    """CRC-32 of codes as 32-bit little-endian numbers, row by row, after those before."""
    return zlib.crc32(codes.numpy().astype("<u4").tobytes(), before)


def _checked(codes: Tensor, before: int, wanted: Sequence[int], layer: int) -> int:
    """The checksum of the codes up to those of a layer.

    Raises:
        InputError: it is another one.
    """
    found = _checksum(codes, before)
    mask = 0xFFFFFFFF if layer == len(wanted) - 1 else 0xFFFF
    if found & mask != wanted[layer]:
        raise InputError(
            f"content is damaged or cut in layer {layer + 1} of {len(wanted)}, or written where "
            "other probabilities are computed"
        )
    return found
