"""Retrieval from random strings by content or by place, after "Repeat After Me" (arXiv 2402.01032).

ngram       the row ends in ``n`` tokens that occur once before; the answer is the token behind them
position    the row ends in the number of a place; the answer is the token at this place

    x1 x2 ... xm | x7 x8 x9 -> x10        ngram, n = 3
    x1 x2 ... xm | 5 -> x5                position

A model with states of a fixed size has to keep the whole string; softmax attention finds the n-gram by
its content. Positions are what rotary and learnt positions, counting heads or a state are needed for.
"""

from typing import Any, Literal, get_args

import numpy as np

from .errors import nearest
from .scoring import IGNORE, Progress, score
from .sources import Source
from .stats import above_chance, clustered_interval, ratio_and_error

By = Literal["ngram", "position"]

_MARK, _QUERY = 128, 2  # id of the bar; the bar and the answer's place are not of the string


class Lookup(Source):
    """Rows of a random string, a bar, what is looked up, and the answer, which alone has a label.

    Args:
        by: "ngram" or "position".
        gram: n, the tokens of the n-gram.
        sequence_length: tokens per row.
        seed: of the stream.
        start: index of the first row.
        token_ids: half-open range of ids of the string.
        place_ids: the same for the numbers of places, the first of which is place 0.
        tokenizer: not read; rows are ids.

    Raises:
        ValueError: sizes that do not fit together.
    """

    name = "lookup"

    def __init__(
        self,
        *,
        by: By = "ngram",
        gram: int = 3,
        sequence_length: int = 64,
        seed: int = 0,
        start: int = 0,
        token_ids: tuple[int, int] = (130, 162),
        place_ids: tuple[int, int] = (162, 256),
        tokenizer: Any = None,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        if by not in get_args(By):
            raise ValueError(
                f"lookup.by: expected ngram or position, got {by!r}{nearest(str(by), get_args(By))}"
            )
        self.by, self.gram = by, gram
        self.name = f"lookup {by}"
        self.token_ids, self.place_ids = tuple(token_ids), tuple(place_ids)
        self.length = sequence_length - _QUERY - (gram if by == "ngram" else 1)
        kinds, places = (high - low for low, high in (self.token_ids, self.place_ids))
        if gram < 1 or self.length < gram + 1:
            raise ValueError(
                f"lookup: expected gram >= 1 and sequence_length of at least {2 * gram + 3}, got"
                f" gram={gram}, sequence_length={sequence_length}"
            )
        if by == "position" and self.length > places:
            raise ValueError(
                f"lookup.place_ids: expected at least {self.length} ids, one for each place, got"
                f" {places}; try a shorter sequence_length"
            )
        if by == "ngram" and kinds**gram < 4 * self.length:
            raise ValueError(
                f"lookup.gram: expected n-grams that seldom repeat in {self.length} tokens of {kinds}"
                f" kinds, got gram={gram}; try a larger gram"
            )

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the tokens."""
        return 1 / (self.token_ids[1] - self.token_ids[0])

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one row drawn from this generator."""
        string = rng.integers(*self.token_ids, self.length)
        if self.by == "position":
            place = int(rng.integers(self.length))
            asked, answer = np.array([self.place_ids[0] + place]), string[place]
        else:
            place = self._unique(string, rng)
            asked, answer = string[place : place + self.gram], string[place + self.gram]
        ids = np.concatenate([string, [_MARK], asked, [answer]]).astype(np.int64)
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        labels[-1] = answer
        return {"input_ids": ids, "labels": labels}

    def _unique(self, string: np.ndarray, rng: np.random.Generator) -> int:
        """Return the place of an n-gram that occurs once and has a token behind it."""
        grams = np.lib.stride_tricks.sliding_window_view(string, self.gram)
        _, places, counts = np.unique(grams, axis=0, return_index=True, return_counts=True)
        once = places[(counts == 1) & (places < self.length - self.gram)]
        if not len(once):  # next to impossible, by the check of the sizes
            return int(rng.integers(self.length - self.gram))
        return int(rng.choice(once))


def evaluate_lookup(
    model,
    *,
    by: By = "ngram",
    gram: int = 3,
    lengths: tuple[int, ...] = (64,),
    n: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure look-ups by n-gram or by position, ``n`` rows for each length.

    Args:
        model: a causal language model.
        by: "ngram" or "position".
        gram: tokens of the n-gram.
        lengths: tokens per row.
        n: rows per length.
        seed: of the rows, which training never sees.
        batch_size: rows per forward; None chooses.
        progress: called with the number of rows done and of rows in all.
        allow_longer: permit rows beyond ``max_position_embeddings``.

    Returns:
        accuracy with its error and a 95% interval, chance, and "cells" with the same for each length.
    """
    cells, every, chance = [], [], 0.0
    for length in lengths:
        source = Lookup(by=by, gram=gram, sequence_length=length, seed=seed)
        source.stream = "test"
        chance = source.chance
        scored = score(
            model,
            source.take(n),
            batch_size=batch_size,
            progress=progress,
            allow_longer=allow_longer,
        )
        right = [int(row.correct[0]) for row in scored]
        cells.append({"length": length, **_summary(right, chance)})
        every += right
    tokens = {"min": min(lengths), "max": max(lengths)}
    found = _summary(every, chance)
    return {**found, "items": list(map(float, every)), "cells": cells, "by": by, "tokens": tokens}


def _summary(right: list[int], chance: float) -> dict[str, Any]:
    asked = [1] * len(right)
    accuracy, error = ratio_and_error(right, asked)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": clustered_interval(right, asked),
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "n": len(right),
        "truncated": 0,
    }
