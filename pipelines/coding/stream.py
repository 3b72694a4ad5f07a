"""Symbols to bytes and back by range coding (constriction), given tables of their probabilities."""

import constriction
import numpy as np
from jaxtyping import Float64, Int64

from tokenizer.storage.errors import InputError

_WORD = 4
_STATE = 2 * _WORD
"""Bytes that the decoder looks at for a symbol."""
_WHOLE = 1 << 8 * _STATE
# The fast rule, which is the same function of the table everywhere, whatever its default is.
_FAMILY = constriction.stream.model.Categorical(perfect=False)


class StreamWriter:
    """One stream for all layers, so that a layer costs no padding of its own."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def write(
        self, symbols: Int64[np.ndarray, " n"], tables: Float64[np.ndarray, "n symbols"]
    ) -> None:
        """Appends symbols; a row of the tables holds whole numbers > 0, the shares of one."""
        if tables.shape[1] > 1:  # the only symbol there is takes nothing
            self._encoder.encode(symbols.astype(np.int32), _FAMILY, tables)

    @property
    def num_bytes(self) -> int:
        """After so many all that was written can be read, whatever follows."""
        num_words, _ = self._position()
        return _WORD * num_words + _STATE

    def finish(self) -> bytes:
        """The fewest bytes that stand for what was written, if zeros are taken to follow."""
        num_words, (low, size) = self._position()
        words = np.concatenate([self._encoder.get_compressed(), np.zeros(2, np.uint32)])
        content = words.astype(">u4").tobytes()
        end = content[_WORD * num_words : _WORD * num_words + _STATE]
        if int.from_bytes(end, "big") < low:  # the words before were raised by one since
            low -= _WHOLE
        first, last = max(low, 0), low + size - 1
        for length in range(_STATE + 1):
            unit = 1 << 8 * (_STATE - length)
            value = -(-first // unit) * unit
            if value <= last:
                break
        whole = int.from_bytes(content[: _WORD * num_words], "big") * _WHOLE + value
        return whole.to_bytes(_WORD * num_words + _STATE, "big").rstrip(b"\0")

    def _position(self) -> tuple[int, tuple[int, int]]:
        """Words written, and lower end and size of the interval that is left of the next two."""
        num_words, (low, size) = self._encoder.pos()
        return int(num_words), (int(low), int(size))


class StreamReader:
    """Reads what `StreamWriter` has written."""

    def __init__(self, content: bytes) -> None:
        padded = content + bytes(-len(content) % _WORD + _STATE)
        words = np.frombuffer(padded, ">u4").astype(np.uint32)
        self._decoder = constriction.stream.queue.RangeDecoder(words)

    def read(self, tables: Float64[np.ndarray, "n symbols"]) -> Int64[np.ndarray, " n"]:
        """The next symbols.

        Raises:
            InputError: nothing that was written with these tables looks so.
        """
        if tables.shape[1] == 1:
            return np.zeros(len(tables), np.int64)
        try:
            symbols = self._decoder.decode(_FAMILY, tables)
        except AssertionError as error:  # which is what constriction raises
            raise InputError("content is damaged or cut: no codes look so") from error
        return np.asarray(symbols, np.int64)
