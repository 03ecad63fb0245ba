"""Endless training sources in which every row is a function of its index.

A source is an iterable of ``{"input_ids": ..., "labels": ...}`` (numpy int64 arrays of
``sequence_length`` tokens, labels in the convention of transformers, -100 for no label). Row i
depends only on (task, seed, i), so a resumed run calls :meth:``Source.skip`` and reads exactly the
rows of an uninterrupted run.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from .seeding import generator


class Source(ABC):
    """An endless, randomly addressable stream of rows.

    Attributes:
        name: of the task.
        sequence_length: tokens per row.
        seed: of the stream; evaluation uses a stream of its own, whatever the seed.
        start: index of the first row that iteration yields.
    """

    name: str = ""

    def __init__(self, *, sequence_length: int, seed: int, start: int = 0, stream: str = "train"):
        self.sequence_length = sequence_length
        self.seed = seed
        self.start = start
        self.stream = stream

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one row drawn from this generator."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index < 0:
            raise IndexError(f"index: expected at least 0, got {index}")
        return self.draw(generator(self.name, self.stream, self.seed, index))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        index = self.start
        while True:
            yield self[index]
            index += 1

    def skip(self, rows: int) -> "Source":
        """Move the start of the stream by ``rows`` and return the source itself."""
        self.start += rows
        return self

    def take(self, rows: int) -> list[dict[str, np.ndarray]]:
        """Return the first ``rows`` rows from the start."""
        return [self[self.start + offset] for offset in range(rows)]
