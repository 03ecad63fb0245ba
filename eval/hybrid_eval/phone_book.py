r"""A phone book in bytes: names with numbers, then queries of names (arXiv 2406.07887, section
3.3).

    kqz=4821\nabc=0930\n...?abc=0930\n?kqz=4821\n
                            ^^^^ scored: every digit of the number

``kv_recall`` is the same task in natural language; this task is for models trained on its format,
and is also a source of training data.
"""

from typing import Any

import numpy as np

from .scoring import IGNORE, Progress, score
from .sources import Source
from .stats import above_chance, clustered_interval, ratio_and_error

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
_NAME, _DIGITS = 3, 4
_LINE = _NAME + 1 + _DIGITS + 1  # abc=0123\n
_QUESTION = 1 + _LINE  # ?abc=0123\n


class PhoneBook(Source):
    """Endless phone books, each followed by questions.

    Args:
        sequence_length: tokens per row; padded with line feeds.
        entries: names in the book; None for as many as fit.
        min_entries: draw the number of names from this to ``entries``, so that short books help
            training. None: always ``entries``.
        queries: number of queried names.
        seed: of the stream.
        start: index of the first row.
        tokenizer: ignored; rows are bytes.

    Raises:
        ValueError: inconsistent sizes.
    """

    name = "phone_book"

    def __init__(
        self,
        *,
        sequence_length: int = 128,
        entries: int | None = None,
        min_entries: int | None = None,
        queries: int = 4,
        seed: int = 0,
        start: int = 0,
        tokenizer: Any = None,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        room = (sequence_length - queries * _QUESTION) // _LINE
        self.entries = room if entries is None else entries
        self.min_entries = self.entries if min_entries is None else min_entries
        self.queries = queries
        if queries < 1 or not 1 <= self.min_entries <= self.entries or queries > self.min_entries:
            raise ValueError(
                f"phone_book: expected 1 <= queries <= min_entries <= entries, got queries={queries}, "
                f"min_entries={self.min_entries}, entries={self.entries}"
            )
        if self.entries > room:
            needed = self.entries * _LINE + queries * _QUESTION
            raise ValueError(
                f"phone_book: {self.entries} entries and {queries} queries take {needed} tokens, "
                f"sequence_length is {sequence_length}"
            )

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make one row from a generator of its own."""
        count = int(rng.integers(self.min_entries, self.entries + 1))
        codes = rng.choice(26**_NAME, count, replace=False)
        names = _LETTERS[np.stack([codes // 26**place % 26 for place in range(_NAME)], axis=1)]
        digits = rng.integers(0, 10, (count, _DIGITS)) + ord("0")
        lines = np.concatenate(
            [names, np.full((count, 1), ord("=")), digits, np.full((count, 1), ord("\n"))], axis=1
        )
        asked = rng.permutation(count)[: self.queries]
        marks = np.full((self.queries, 1), ord("?"))
        ids = np.full(self.sequence_length, ord("\n"), dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        book = count * _LINE
        ids[:book] = lines.reshape(-1)
        end = book + self.queries * _QUESTION
        ids[book:end] = np.concatenate([marks, lines[asked]], axis=1).reshape(-1)
        starts = book + np.arange(self.queries) * _QUESTION + 1 + _NAME + 1
        at = (starts[:, None] + np.arange(_DIGITS)).reshape(-1)
        labels[at] = ids[at]
        return {"input_ids": ids, "labels": labels}


def evaluate_phone_book(
    model,
    *,
    lengths: tuple[int, ...] = (128,),
    queries: int = 4,
    n: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure look-ups in books that fill a length, teacher-forced, ``n`` books for each length.

    Args:
        model: a causal language model.
        lengths: tokens per row.
        queries: look-ups in each book.
        n: books per length.
        seed: seed of the books, from a stream that training never uses.
        batch_size: rows per forward; None chooses.
        progress: called with the number of rows done and of rows in all.
        allow_longer: permit rows beyond ``max_position_embeddings``.

    Returns:
        accuracy (all digits of a number right) with its error over books and a 95% interval, and
        "cells" with the same for each length.
    """
    cells, everything = [], []
    for length in lengths:
        source = PhoneBook(sequence_length=length, queries=queries, seed=seed)
        source.stream = "test"
        scored = score(
            model,
            source.take(n),
            batch_size=batch_size,
            progress=progress,
            allow_longer=allow_longer,
        )
        right = [int(row.correct.reshape(queries, _DIGITS).all(1).sum()) for row in scored]
        cells.append({"length": length, "entries": source.entries, **_summary(right, queries)})
        everything += right
    chance = 10.0**-_DIGITS
    found = _summary(everything, queries)
    return {
        **found,
        "chance": chance,
        "above_chance": above_chance(found["accuracy"], chance),
        "cells": cells,
        "tokens": {"min": min(lengths), "max": max(lengths)},
        "truncated": 0,
        "items": [count / queries for count in everything],
    }


def _summary(right: list[int], queries: int) -> dict[str, Any]:
    asked = [queries] * len(right)
    accuracy, error = ratio_and_error(right, asked)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": clustered_interval(right, asked),
        "n": len(right),
    }
