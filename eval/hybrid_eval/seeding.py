"""A random generator of its own for every sample.

Each sample is drawn from a generator seeded by what the sample *is* (task, length, depth,
index), never from a shared stream: drawing one more sample, or another length first, changes
no other sample.
"""

import zlib

import numpy as np


def generator(task: str, *key: int | float | str) -> np.random.Generator:
    """Return the generator of one sample.

    Args:
        task: name of the task; two tasks with equal keys draw different numbers.
        key: what tells this sample from the others of the task; a number is told apart from
            the string that prints the same.
    """
    words = [zlib.crc32(repr(part).encode("utf-8")) for part in (task, *key)]
    return np.random.default_rng(words)
