"""A needle in real text, for models that were trained on its format.

The needle is a key-value pair in the token format of :mod:``hybrid_eval.mqar``, hidden in real
text; at the end the key comes once more and the model must give the value:

    text text k v text ... text k -> v

Every cell of the depth x length grid is exact: the row (answer included) has exactly that many
tokens, and the key stands at round(depth * (last place - first place)). Depth 0 is the start of
the row, 1 the place right before the question. For models that read language, see
:mod:``hybrid_eval.niah_grid``.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .corpus import Corpus, load_corpus, stdlib_documents
from .errors import id_range
from .mqar import KEY_IDS, VALUE_IDS
from .scoring import IGNORE, Progress, score
from .seeding import generator
from .sources import Source
from .stats import above_chance, mean_and_error, proportion_interval
from .tokens import ByteEncoder, Encoder, Haystack

LENGTHS = (32, 64, 128, 256, 512)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _check_needles(length: int, needles: int, key_ids, value_ids) -> None:
    keys = key_ids[1] - key_ids[0]
    if not 1 <= needles <= keys:
        raise ValueError(
            f"needles must be 1 .. {keys} (different keys in {key_ids}), got {needles}"
        )
    # every needle takes two tokens, the question and its answer two more
    shortest = 2 * needles + 2
    if length < shortest:
        raise ValueError(f"{needles} needle(s) and a question take {shortest} tokens, got {length}")


def _insert(text: np.ndarray, places: np.ndarray, keys, values) -> tuple[np.ndarray, np.ndarray]:
    """Put pairs before text[place]; return the tokens and where each key now stands."""
    order = np.argsort(places, kind="stable")
    pairs = np.stack([keys[order], values[order]], axis=1).reshape(-1)
    tokens = np.insert(text, np.repeat(places[order], 2), pairs)
    positions = np.empty_like(places)
    positions[order] = places[order] + 2 * np.arange(len(places))
    return tokens, positions


class NeedleSource(Source):
    """Endless needle rows for training; see :func:``needle``."""

    name = "needle"

    def __init__(
        self,
        *,
        sequence_length: int,
        min_length: int,
        needles: int,
        haystack: Haystack,
        key_ids: tuple[int, int],
        value_ids: tuple[int, int],
        seed: int,
        start: int = 0,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        _check_needles(min_length, needles, key_ids, value_ids)
        if min_length > sequence_length:
            raise ValueError(
                f"min_length {min_length} is longer than sequence_length {sequence_length}"
            )
        self.min_length, self.needles, self.haystack = min_length, needles, haystack
        self.key_ids, self.value_ids = key_ids, value_ids

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make one row: a needle problem of random length and depths, after unrelated text."""
        length = int(rng.integers(self.min_length, self.sequence_length + 1))
        asked = int(rng.integers(1, min(self.needles, (length - 2 * self.needles) // 2) + 1))
        keys = rng.choice(np.arange(*self.key_ids), self.needles, replace=False)
        values = rng.integers(*self.value_ids, self.needles)
        text_length = length - 2 * self.needles - 2 * asked
        text = self.haystack.cut(
            int(rng.integers(len(self.haystack.ids))), text_length + self.sequence_length - length
        )
        places = self.sequence_length - length + rng.integers(0, text_length + 1, self.needles)
        body, _ = _insert(text, places, keys, values)
        which = rng.choice(self.needles, asked, replace=False)
        questions = np.stack([keys[which], values[which]], axis=1).reshape(-1)
        ids = np.concatenate([body, questions])
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        labels[len(body) + 1 :: 2] = values[which]
        return {"input_ids": ids, "labels": labels}


def needle(
    *,
    sequence_length: int = 256,
    min_length: int | None = None,
    needles: int = 1,
    haystack: Haystack | None = None,
    tokenizer: Encoder | None = None,
    key_ids: tuple[int, int] = KEY_IDS,
    value_ids: tuple[int, int] = VALUE_IDS,
    seed: int = 0,
    start: int = 0,
) -> NeedleSource:
    """Return an endless, index-seeded source of needle rows for training.

    Each row has a random length of problem (unrelated text before it fills the row), random
    depths, and asks for a random number of its needles.

    Args:
        sequence_length: tokens per row.
        min_length: shortest problem; None allows everything that holds the needles.
        needles: key-value pairs hidden in a row, with different keys.
        haystack: text to hide them in; None takes the standard library's training split.
        tokenizer: encoder of that text if ``haystack`` is None; None reads bytes.
        key_ids: half-open range of token ids to draw keys from.
        value_ids: the same for values.
        seed: of the stream.
        start: index of the first row.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """
    key_ids, value_ids = id_range("key_ids", key_ids), id_range("value_ids", value_ids)
    if haystack is None:
        documents = stdlib_documents("train")
        corpus = Corpus(documents, "Python standard library sources, training split")
        haystack = Haystack(corpus, tokenizer or ByteEncoder(), (key_ids, value_ids))
    return NeedleSource(
        sequence_length=sequence_length,
        min_length=2 * needles + 2 if min_length is None else min_length,
        needles=needles,
        haystack=haystack,
        key_ids=key_ids,
        value_ids=value_ids,
        seed=seed,
        start=start,
    )


def needle_row(
    *,
    length: int,
    depth: float,
    index: int,
    haystack: Haystack,
    needles: int = 1,
    key_ids: tuple[int, int] = KEY_IDS,
    value_ids: tuple[int, int] = VALUE_IDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Make one sample of the grid.

    Returns:
        input_ids and labels (``length`` tokens, the answer is the last one), and where the
        needle is: depth, needle_position (token index of its key), haystack (description).

    Raises:
        ValueError: depth outside [0, 1], or more needles than fit.
    """
    _check_needles(length, needles, key_ids, value_ids)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in [0, 1], got {depth}")
    rng = generator("needle", "test", seed, length, depth, index)
    keys = rng.choice(np.arange(*key_ids), needles, replace=False)
    values = rng.integers(*value_ids, needles)
    text_length = length - 2 * needles - 2
    text = haystack.cut(int(rng.integers(len(haystack.ids))), text_length)
    # distractors first, then the needle proper at exactly its place among text and distractors
    body, _ = _insert(text, rng.integers(0, text_length + 1, needles - 1), keys[1:], values[1:])
    place = round(depth * len(body))
    # never between the key and the value of a distractor
    if place > 0 and place < len(body) and key_ids[0] <= body[place - 1] < key_ids[1]:
        place -= 1
    ids = np.concatenate([body[:place], [keys[0], values[0]], body[place:], [keys[0], values[0]]])
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[-1] = values[0]
    return {
        "input_ids": ids,
        "labels": labels,
        "depth": depth,
        "needle_position": place,
        "haystack": haystack.description,
    }


@lru_cache(maxsize=1)
def _byte_haystack() -> Haystack:
    return Haystack(load_corpus(None), ByteEncoder(), (KEY_IDS, VALUE_IDS))


def evaluate_needle(
    model,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    n: int = 32,
    needles: int = 1,
    haystack: Haystack | None = None,
    key_ids: tuple[int, int] = KEY_IDS,
    value_ids: tuple[int, int] = VALUE_IDS,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure the depth x length grid, ``n`` samples in every cell, teacher-forced.

    Args:
        model: a causal language model.
        lengths: tokens per row, answer included.
        depths: of the needle, in [0, 1].
        n: samples per cell.
        needles: pairs hidden in the row; one is asked for, the rest distract.
        haystack: None takes the standard library's held-out split as bytes.
        key_ids: half-open range of token ids to draw keys from.
        value_ids: the same for values.
        seed: of the samples.
        batch_size: rows per forward; None chooses.
        progress: called with the number of rows done and of rows in all.
        allow_longer: permit rows beyond ``max_position_embeddings``.

    Returns:
        accuracy over all cells with its standard error and 95% interval, chance, nll, and
        "cells": accuracy, stderr, interval, nll and n for every length and depth.
    """
    key_ids, value_ids = id_range("key_ids", key_ids), id_range("value_ids", value_ids)
    if haystack is None:
        haystack = (
            _byte_haystack()
            if (key_ids, value_ids) == (KEY_IDS, VALUE_IDS)
            else Haystack(load_corpus(None), ByteEncoder(), (key_ids, value_ids))
        )
    grid = [(length, depth) for length in lengths for depth in depths]
    rows = [
        needle_row(
            length=length,
            depth=depth,
            index=index,
            haystack=haystack,
            needles=needles,
            key_ids=key_ids,
            value_ids=value_ids,
            seed=seed,
        )
        for length, depth in grid
        for index in range(n)
    ]
    scored = score(model, rows, batch_size=batch_size, progress=progress, allow_longer=allow_longer)
    exact = [float(row.exact) for row in scored]
    nll = [float(row.nll.sum()) for row in scored]
    chance = 1 / (value_ids[1] - value_ids[0])
    result = summarise_grid(grid, n, exact, nll, chance)
    result["haystack"] = haystack.description
    result["tokens"] = {"min": min(lengths), "max": max(lengths)}
    return result


def summarise_grid(
    grid: Sequence[tuple[int, float]],
    n: int,
    exact: Sequence[float],
    nll: Sequence[float],
    chance: float,
) -> dict[str, Any]:
    """Turn per-sample scores, ``n`` for each (length, depth) in order, into the grid's figures."""
    cells = []
    for number, (length, depth) in enumerate(grid):
        part = slice(number * n, (number + 1) * n)
        accuracy, error = mean_and_error(exact[part])
        cells.append(
            {
                "length": length,
                "depth": depth,
                "accuracy": accuracy,
                "stderr": error,
                "interval": proportion_interval(sum(exact[part]), n),
                "nll": mean_and_error(nll[part])[0],
                "n": n,
            }
        )
    accuracy, error = mean_and_error(exact)
    mean_nll, nll_error = mean_and_error(nll)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": proportion_interval(sum(exact), len(exact)),
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "nll": mean_nll,
        "nll_stderr": nll_error,
        "n": len(exact),
        "cells": cells,
        "truncated": 0,
        "items": list(exact),
    }
