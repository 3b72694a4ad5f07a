"""Range coding: what is read is what was written, in the bits that the tables say."""

import math

import numpy as np
import pytest

from pipelines.coding.stream import StreamReader, StreamWriter
from tokenizer.storage.errors import InputError


@pytest.mark.parametrize("seed", range(300))
def test_symbols_come_back_in_the_bits_of_their_tables(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 20))
    # Up to tables that are nearly certain, which leave runs of equal words.
    sharpness = generator.choice([1, 10, 40])
    writer, bits, parts, ends = StreamWriter(), 0.0, [], []
    for _ in range(generator.integers(1, 6)):
        count = int(generator.integers(0, 60))
        shares = generator.random((count, size)) ** sharpness
        tables = np.round(shares / shares.sum(1, keepdims=True) * 2**20) + 1
        odds = tables / tables.sum(1, keepdims=True)
        symbols = np.array([generator.choice(size, p=row) for row in odds], np.int64)
        bits -= np.log2(odds[np.arange(count), symbols]).sum()
        writer.write(symbols, tables)
        parts.append((symbols, tables))
        ends.append(writer.num_bytes)
    content = writer.finish()
    assert len(content) <= math.ceil(bits / 8 + 1e-2) + 1
    for number, end in enumerate(ends, 1):
        for followed in (content, content[:end]):
            reader = StreamReader(followed)
            for symbols, tables in parts[:number]:
                np.testing.assert_array_equal(reader.read(tables), symbols)


def test_what_was_not_written_is_refused() -> None:
    with pytest.raises(InputError, match="content is damaged or cut: no codes look so"):
        StreamReader(b"\xff" * 40).read(np.ones((50, 7)))
