"""Random generators, one per sample.

Each sample has a generator seeded by its identity (task, length, depth, index) instead of a shared
stream, so that additional samples or another order change no other sample.
"""

import zlib

import numpy as np


def generator(task: str, *key: int | float | str) -> np.random.Generator:
    """Return the generator of one sample.

    Args:
        task: name of the task; two tasks with equal keys draw different numbers.
        key: identity of the sample within the task; a number and its string are different.
    """
    words = [zlib.crc32(repr(part).encode("utf-8")) for part in (task, *key)]
    return np.random.default_rng(words)
