"""Several weighted sources as one data set; row i depends only on i.

Rows are drawn in blocks of ``BLOCK``. Each block has exactly the share of each source, in an order
drawn from (seed, block). So the shares are exact, and the position of row i in its source is known
without drawing the rows before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from hybrid.data.packing import IGNORE, Row
from hybrid.data.rows import Rows

BLOCK = 1000


class DataError(ValueError):
    """A source failed to return a row during training."""

    def __init__(self, message: str) -> None:
        # torch rebuilds an error of a worker process, with its traceback in front of the message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class Mixture(Dataset):
    """``length`` rows drawn from weighted ``sources``.

    Args:
        sources: the sources of rows.
        weights: one weight for each source, relative to each other.
        length: rows of the whole run.
        seed: seed of the order of the sources.
        vocabulary: ids are below it; None if not known.

    Raises:
        ValueError: a weight is too small for one row in ``BLOCK``.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        weights: Sequence[float],
        length: int,
        seed: int,
        vocabulary: int | None = None,
    ) -> None:
        self.sources, self.length, self.seed = sources, length, seed
        self.vocabulary = vocabulary
        self.counts = shares(weights)
        self._dealt: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected below {self.length}, got {index}")
        source, place = self.locate(index)
        try:
            row = self.sources[source].row(place)
            if self.vocabulary is not None:
                check_ids(row, self.vocabulary)
        except (ValueError, OSError) as error:
            raise DataError(
                f"row {place} of source {source}: {error}; correct the data and run the same command"
                " again: earlier checkpoints are kept"
            ) from error
        return row

    def locate(self, index: int) -> tuple[int, int]:
        """Return the source of row ``index``, and the index of the row in that source."""
        if len(self.sources) == 1:
            return 0, index
        block, place = divmod(index, BLOCK)
        if self._dealt is None or self._dealt[0] != block:
            self._dealt = block, *self._deal(block)
        source = int(self._dealt[1][place])
        return source, block * int(self.counts[source]) + int(self._dealt[2][place])

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (BLOCK,) the source of each row of a block, and its rank among that source's rows."""
        deck = np.repeat(np.arange(len(self.counts)), self.counts)
        np.random.default_rng([self.seed, block]).shuffle(deck)
        rank = np.zeros(BLOCK, np.int64)
        for source, count in enumerate(self.counts):
            rank[deck == source] = np.arange(count)
        return deck, rank


def check_ids(row: Row, vocabulary: int) -> None:
    """Refuse ids and labels outside the vocabulary; an accelerator would only report an assertion.

    Raises:
        ValueError: names the value that is furthest outside.
    """
    asked = {"token id": row["input_ids"]}
    if "labels" in row:
        asked["label"] = row["labels"][row["labels"] != IGNORE]
    for what, ids in asked.items():
        if not ids.size:
            continue
        for found in (int(ids.min()), int(ids.max())):
            if not 0 <= found < vocabulary:
                raise ValueError(
                    f"{what}: expected 0 or above and below the model's vocab_size {vocabulary},"
                    f" got {found}" + (f"; try model.vocab_size: {found + 1}" if found > 0 else "")
                )


def shares(weights: Sequence[float]) -> np.ndarray:
    """Return (len(weights),) int64, the rows of each source in a block; their sum is ``BLOCK``."""
    exact = np.asarray(weights, np.float64) / max(weights)  # the sum of the weights may overflow
    exact *= BLOCK / exact.sum()
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: BLOCK - counts.sum()]] += 1
    if len(weights) > 1 and (small := np.flatnonzero(counts == 0)).size:
        raise ValueError(
            f"data[{small[0]}].weight: expected at least one row in {BLOCK}, got"
            f" {weights[small[0]]} of {sum(map(float, weights)):g} in all; try a larger weight or"
            " remove the source"
        )
    return counts
