"""Random damage to the content of a file."""

import numpy as np


def spoiled(content: bytes, generator: np.random.Generator) -> bytes:
    """Flips bits, cuts, zeroes a block or repeats it, or appends; never what it was."""
    changed = bytearray(content)
    while changed == content:
        kind = generator.integers(6)
        start, end = sorted(generator.integers(len(content) + 1, size=2).tolist())
        if kind <= 1:  # anywhere, or near the start, where headers are
            last = min(len(content), (len(content), 64)[kind])
            for place in generator.integers(last, size=int(generator.integers(1, 9))):
                changed[place] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            del changed[start:]
        elif kind == 3:
            changed[start:end] = bytes(end - start)
        elif kind == 4:
            changed[end:end] = content[start:end] * int(generator.integers(1, 100))
        else:
            changed += generator.bytes(int(generator.integers(1, 10_000)))
    return bytes(changed)
