"""Small reasoning tasks for models trained from scratch, with endless training sources.

state_tracking  the running product of group elements: parity, S3, S5, A5, sums modulo a number, or
                the state of an automaton (a regular language). Scored at every step: solving
                parity takes a state that a stack with positive eigenvalues alone does not have
(arXiv 2411.12537). hops_k          chains of assignments at a fixed length; the answer is k hops
                away. At k = 0 it is pure retrieval, so what is lost from k = 0 to k = 4 is the
reasoning. icl_fn          a random mapping shown in examples x y x y ..., asked again: accuracy
                against the number of times that an x has been shown.

Ids below 128 are free for text; tasks draw theirs from 128 upwards, as :mod:``hybrid_eval.mqar``.
"""

import re
from itertools import combinations, permutations
from typing import Any

import numpy as np

from .errors import nearest
from .scoring import IGNORE, Progress, score
from .sources import Source
from .stats import above_chance, clustered_interval, ratio_and_error

FIRST_ID = 128
# permutations of so many points
_GROUPS = {"parity": 2, "S3": 3, "S5": 5, "A5": 5}
# symbol -> state -> next state of automata that are not groups
_AUTOMATA: dict[str, list[list[int]]] = {
    # keep, write 0, write 1: the regular language of the last write
    "flip_flop": [[0, 1], [0, 0], [1, 1]],
    # a walk of steps -1, 0, 1 on a circle of five
    "cycle_5": [[(state + step) % 5 for state in range(5)] for step in (-1, 0, 1)],
}
_LARGEST_MODULUS = 64


def _even(permutation: tuple[int, ...]) -> bool:
    """Return whether a permutation is even."""
    return sum(a > b for a, b in combinations(permutation, 2)) % 2 == 0


def group_elements(group: str) -> list[tuple[int, ...]]:
    """Return the elements of a group as permutations, the identity first; none of an automaton."""
    if group not in _GROUPS:
        return []
    return [p for p in permutations(range(_GROUPS[group])) if group != "A5" or _even(p)]


def transitions(group: str) -> np.ndarray:
    """Return the next state for each symbol and state, shape (symbols, states); state 0 is the
    first.

    Raises:
        ValueError: an unknown group.
    """
    modulus = re.fullmatch(r"Z([1-9]\d*)", group)
    if modulus is not None and 2 <= int(modulus[1]) <= _LARGEST_MODULUS:
        numbers = np.arange(int(modulus[1]))
        return (numbers[:, None] + numbers) % len(numbers)
    if group in _AUTOMATA:
        return np.asarray(_AUTOMATA[group])
    if group not in _GROUPS:
        known = [*_GROUPS, *_AUTOMATA]
        raise ValueError(
            f"unknown group {group!r}{nearest(group, known)}; Z2 to Z{_LARGEST_MODULUS} add modulo that"
        )
    elements = group_elements(group)
    codes = {element: code for code, element in enumerate(elements)}
    return np.asarray([[codes[tuple(a[i] for i in b)] for b in elements] for a in elements])


class StateTracking(Source):
    """Rows of a word problem: group elements, and at each step the product so far as label.

    The label at position t + 1 is the product of the elements at positions 0 .. t, so the model
    must know it when it has read the element at t. Product ids stand above the element ids. For an
    automaton read "symbol" for element and "state" for product.

    Args:
        group: "parity", "S3", "S5", "A5" (60 elements, not solvable), "Z2" to "Z64" (sums modulo a
            number), or the automata "flip_flop" and "cycle_5".
        sequence_length: tokens per row.
        seed: of the stream.
        start: index of the first row.
        first_id: id of the identity.
        tokenizer: ignored.
    """

    name = "state_tracking"

    def __init__(
        self,
        *,
        group: str = "parity",
        sequence_length: int = 64,
        seed: int = 0,
        start: int = 0,
        first_id: int = FIRST_ID,
        tokenizer: Any = None,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        self.table = transitions(group)
        self.elements = np.asarray(group_elements(group))
        self.group, self.first_id = group, first_id

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the states."""
        return 1 / self.table.shape[1]

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one row drawn from this generator."""
        symbols = len(self.table)
        drawn = rng.integers(0, symbols, self.sequence_length)
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        state = 0
        for t, symbol in enumerate(drawn[:-1]):
            state = int(self.table[symbol, state])
            labels[t + 1] = self.first_id + symbols + state
        return {"input_ids": drawn + self.first_id, "labels": labels}


class Hops(Source):
    """Rows of assignments "name source" in random order, then a name; the answer is its value.

    Each chain starts at a value and has exactly ``hops`` names between the value and the name
    asked for; other chains of the same make fill the row to a fixed number of assignments, so the
    length does not depend on k.

    Args:
        hops: k; None draws it from 0 .. max_hops for every row.
        max_hops: chains have max_hops + 1 names, whatever k is asked.
        chains: number of chains.
        sequence_length: tokens per row; noise ids fill it in front.
        seed: of the stream.
        start: index of the first row.
        name_ids: half-open range of ids of names.
        value_ids: the same for values.
        filler_id: id of filler tokens.
        tokenizer: ignored.

    Raises:
        ValueError: the chains do not fit in a row, or there are too few names.
    """

    name = "hops_k"

    def __init__(
        self,
        *,
        hops: int | None = None,
        max_hops: int = 4,
        chains: int = 4,
        sequence_length: int = 64,
        seed: int = 0,
        start: int = 0,
        name_ids: tuple[int, int] = (128, 192),
        value_ids: tuple[int, int] = (192, 256),
        filler_id: int = 0,
        tokenizer: Any = None,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        if hops is not None and not 0 <= hops <= max_hops:
            raise ValueError(f"hops must be 0 .. max_hops = {max_hops}, got {hops}")
        names = chains * (max_hops + 1)
        if names > name_ids[1] - name_ids[0] or chains > value_ids[1] - value_ids[0]:
            raise ValueError(
                f"{chains} chains of {max_hops + 1} names take {names} names and {chains} values, "
                f"more than name_ids {name_ids} and value_ids {value_ids} have"
            )
        if sequence_length < 2 * names + 2:
            raise ValueError(
                f"{names} assignments and a question take {2 * names + 2} tokens, sequence_length "
                f"is {sequence_length}"
            )
        self.hops, self.max_hops, self.chains = hops, max_hops, chains
        self.name_ids, self.value_ids = tuple(name_ids), tuple(value_ids)
        self.filler_id = filler_id

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the values of the row."""
        return 1 / self.chains

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one row drawn from this generator."""
        k = int(rng.integers(self.max_hops + 1)) if self.hops is None else self.hops
        per_chain = self.max_hops + 1
        names = rng.choice(np.arange(*self.name_ids), self.chains * per_chain, replace=False)
        names = names.reshape(self.chains, per_chain)
        values = rng.choice(np.arange(*self.value_ids), self.chains, replace=False)
        sources = np.concatenate([values[:, None], names[:, :-1]], axis=1)
        pairs = np.stack([names, sources], axis=-1).reshape(-1, 2)
        pairs = pairs[rng.permutation(len(pairs))]
        chain = int(rng.integers(self.chains))
        ids = np.full(self.sequence_length, self.filler_id, dtype=np.int64)
        ids[-2 - pairs.size : -2] = pairs.reshape(-1)
        ids[-2:] = names[chain, k], values[chain]
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        labels[-1] = values[chain]
        return {"input_ids": ids, "labels": labels}


class InContextFunction(Source):
    """Rows x y x y ... of one random mapping; every y is asked, the first of an x cannot be known.

    Args:
        inputs: number of different x.
        sequence_length: tokens per row.
        seed: of the stream.
        start: index of the first row.
        input_ids: half-open range of ids of x.
        output_ids: the same for y.
        tokenizer: ignored.
    """

    name = "icl_fn"

    def __init__(
        self,
        *,
        inputs: int = 8,
        sequence_length: int = 64,
        seed: int = 0,
        start: int = 0,
        input_ids: tuple[int, int] = (128, 192),
        output_ids: tuple[int, int] = (192, 200),
        tokenizer: Any = None,
    ):
        super().__init__(sequence_length=sequence_length, seed=seed, start=start)
        if not 1 <= inputs <= input_ids[1] - input_ids[0]:
            raise ValueError(f"inputs must be 1 .. the size of input_ids {input_ids}, got {inputs}")
        self.inputs = inputs
        self.input_ids, self.output_ids = tuple(input_ids), tuple(output_ids)

    @property
    def chance(self) -> float:
        """Accuracy of a random guess among the outputs."""
        return 1 / (self.output_ids[1] - self.output_ids[0])

    def draw(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one row drawn from this generator."""
        xs = rng.choice(np.arange(*self.input_ids), self.inputs, replace=False)
        ys = rng.integers(*self.output_ids, self.inputs)
        shown = rng.integers(0, self.inputs, (self.sequence_length + 1) // 2)
        ids = np.stack([xs[shown], ys[shown]], axis=1).reshape(-1)[: self.sequence_length]
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        labels[1::2] = ids[1::2]
        return {"input_ids": ids, "labels": labels}


def _summary(scored, chance: float) -> dict[str, Any]:
    right = [int(row.correct.sum()) for row in scored]
    asked = [len(row.correct) for row in scored]
    accuracy, error = ratio_and_error(right, asked)
    nll, _ = ratio_and_error([float(row.nll.sum()) for row in scored], asked)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": clustered_interval(right, asked),
        "chance": chance,
        "above_chance": above_chance(accuracy, chance),
        "nll": nll,
        "n": len(scored),
        "truncated": 0,
        "items": [r / a for r, a in zip(right, asked, strict=True)],
    }


def _rows(source: Source, n: int):
    source.stream = "test"
    return source.take(n)


def evaluate_state_tracking(
    model,
    *,
    group: str = "parity",
    lengths: tuple[int, ...] = (64, 128),
    n: int = 128,
    seed: int = 0,
    first_id: int = FIRST_ID,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure the running product at every step; lengths beyond training test generalisation.

    Returns:
        accuracy over all steps, and "cells": per length the accuracy over all steps and over the
        last quarter ("late"), where errors of a state that decays show.
    """
    options = {"batch_size": batch_size, "progress": progress, "allow_longer": allow_longer}
    cells, every, chance = [], [], 0.0
    for length in lengths:
        source = StateTracking(group=group, sequence_length=length, seed=seed, first_id=first_id)
        chance = source.chance
        scored = score(model, _rows(source, n), **options)
        late = [float(row.correct[-(length // 4) :].mean()) for row in scored]
        found = _summary(scored, chance)
        found.pop("items")
        cells.append({"length": length, **found, "late": float(np.mean(late))})
        every += scored
    tokens = {"min": min(lengths), "max": max(lengths)}
    return {**_summary(every, chance), "cells": cells, "group": group, "tokens": tokens}


def evaluate_hops(
    model,
    *,
    max_hops: int = 4,
    chains: int = 4,
    sequence_length: int = 64,
    n: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure chains of k = 0 .. max_hops hops, ``n`` rows for each k at one length.

    Returns:
        accuracy over k >= 1, and "cells": per k; "drop" is accuracy at k = 0 less at max_hops.
    """
    options = {"batch_size": batch_size, "progress": progress, "allow_longer": allow_longer}
    cells, reasoned = [], []
    for k in range(max_hops + 1):
        source = Hops(
            hops=k, max_hops=max_hops, chains=chains, sequence_length=sequence_length, seed=seed
        )
        scored = score(model, _rows(source, n), **options)
        found = _summary(scored, source.chance)
        found.pop("items")
        cells.append({"hops": k, **found})
        reasoned += scored if k else []
    tokens = {"min": sequence_length, "max": sequence_length}
    drop = cells[0]["accuracy"] - cells[-1]["accuracy"]
    return {
        **_summary(reasoned or scored, 1 / chains),
        "cells": cells,
        "drop": drop,
        "tokens": tokens,
    }


def evaluate_icl(
    model,
    *,
    inputs: int = 8,
    sequence_length: int = 64,
    n: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Measure an in-context mapping by how often the x has been shown before.

    Returns:
        accuracy over every y whose x has been shown at least once, and "cells": per number of
        shots (0 is a guess; 4 stands for 4 and more).
    """
    source = InContextFunction(inputs=inputs, sequence_length=sequence_length, seed=seed)
    rows = _rows(source, n)
    options = {"batch_size": batch_size, "progress": progress, "allow_longer": allow_longer}
    scored = score(model, rows, **options)
    right: dict[int, list[int]] = {shots: [0] * n for shots in range(5)}
    asked: dict[int, list[int]] = {shots: [0] * n for shots in range(5)}
    for number, (row, found) in enumerate(zip(rows, scored, strict=True)):
        seen: dict[int, int] = {}
        for position, correct in zip(found.positions, found.correct, strict=True):
            x = int(row["input_ids"][position - 1])
            shots = min(seen.get(x, 0), 4)
            right[shots][number] += int(correct)
            asked[shots][number] += 1
            seen[x] = seen.get(x, 0) + 1
    cells = []
    for shots in range(5):
        if sum(asked[shots]):
            accuracy, error = ratio_and_error(right[shots], asked[shots])
            cells.append({"shots": shots, "accuracy": accuracy, "stderr": error})
    known = [sum(right[s][i] for s in range(1, 5)) for i in range(n)]
    total = [sum(asked[s][i] for s in range(1, 5)) for i in range(n)]
    accuracy, error = ratio_and_error(known, total)
    return {
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "interval": clustered_interval(known, total),
        "chance": source.chance,
        "above_chance": above_chance(accuracy, source.chance),
        "n": n,
        "cells": cells,
        "tokens": {"min": sequence_length, "max": sequence_length},
        "truncated": 0,
        "items": [k / t if t else 0.0 for k, t in zip(known, total, strict=True)],
    }
