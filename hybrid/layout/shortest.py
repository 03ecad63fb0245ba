"""From a sequence of layers back to the shortest string that means it."""

from __future__ import annotations

from functools import lru_cache

_EXACT = 256
"""Longest sequence for which the string is provably the shortest."""

_LONGEST_GROUP = 64
"""Longest group that the search looks for in longer sequences."""

# A cost is a single integer: characters first, then counts, so that of two equally short strings
# the plainer one wins (LL, not L2). A sequence of _EXACT layers cannot hold this many counts.
_CHARACTER = 2 * _EXACT


def shortest(tokens: tuple[str, ...]) -> str:
    """Return the shortest layout string for a sequence of layers.

    Args:
        tokens: each layer as it is written alone: "L", "[MS]", "-".

    Returns:
        A string that parses to `tokens`. No shorter one exists if there are at most 256 of them.
        Beyond, the sequence is read once from the left and each repetition of up to 64 layers is
        taken where it saves most; never longer than the tokens written out.
    """
    return _exact(tokens) if len(tokens) <= _EXACT else _greedy(tokens)


@lru_cache(maxsize=512)
def _exact(tokens: tuple[str, ...]) -> str:
    """Dynamic programming over all substrings, by length; O(n^3) at worst, mostly far less.

    A layout is a row of items, and an item is one token or some part repeated. So the best string
    of a substring is its best first item followed by the best string of what is left.
    """
    n = len(tokens)
    reach = _reach(tokens)
    cost = [[0] * (n - length + 1) for length in range(n + 1)]
    # Of the best string of each substring: length and period of the first item.
    first: list[list[tuple[int, int]]] = [[(1, 1)] * len(row) for row in cost]
    # Items worth considering at each start: (length, cost, period).
    items: list[list[tuple[int, int, int]]] = [[] for _ in tokens]
    for length in range(1, n + 1):
        periods = [p for p in range(1, length // 2 + 1) if length % p == 0]
        for i in range(n - length + 1):
            best, head = _item(tokens, i, length, periods, reach, cost)
            item = best
            for k, c, period in reversed(items[i]):  # ties: the longest first item
                total = c + cost[length - k][i + k]
                if best is None or total < best:
                    best, head = total, (k, period)
            assert best is not None
            cost[length][i], first[length][i] = best, head
            if item is not None and item == best:
                items[i].append((length, item, head[1]))
    return _write(tokens, first, 0, n)


def _reach(tokens: tuple[str, ...]) -> list[list[int]]:
    """For each period p and start i: how many tokens from i on equal the token p later."""
    n = len(tokens)
    reach = [[0] * (n + 1) for _ in range(n)]
    for p in range(1, n):
        row = reach[p]
        for i in range(n - p - 1, -1, -1):
            row[i] = row[i + 1] + 1 if tokens[i] == tokens[i + p] else 0
    return reach


def _item(
    tokens: tuple[str, ...],
    i: int,
    length: int,
    periods: list[int],
    reach: list[list[int]],
    cost: list[list[int]],
) -> tuple[int | None, tuple[int, int]]:
    """Cost (None if there is none) and head of the best single item for tokens[i : i + length]."""
    if length == 1:
        return len(tokens[i]) * _CHARACTER, (1, 1)
    best, head = None, (length, length)
    for p in periods:
        if reach[p][i] >= length - p:
            parentheses = 2 if p > 1 else 0
            count = (parentheses + len(str(length // p))) * _CHARACTER + 1
            if best is None or cost[p][i] + count < best:
                best, head = cost[p][i] + count, (length, p)
    return best, head


def _write(tokens: tuple[str, ...], first: list[list[tuple[int, int]]], i: int, length: int) -> str:
    """Write out the choices; recursion halves the length, so it is never deep."""
    parts = []
    while length:
        k, p = first[length][i]
        parts.append(tokens[i] if p == 1 else f"({_write(tokens, first, i, p)})")
        if k > p:
            parts.append(str(k // p))
        i, length = i + k, length - k
    return "".join(parts)


def _greedy(tokens: tuple[str, ...]) -> str:
    """Read from the left; at each place take the repetition that saves most, if any does."""
    parts, i = [], 0
    while i < len(tokens):
        saved, end, part = 0, i + 1, tokens[i]
        runs: list[tuple[int, int]] = []
        for p in range(1, _LONGEST_GROUP + 1):
            # In a run of period q that is p + q long, a multiple p of q cannot reach further.
            if any(p % q == 0 and run >= p + q for q, run in runs):
                continue
            j = i
            while j + p < len(tokens) and tokens[j] == tokens[j + p]:
                j += 1
            repeats = (j - i) // p + 1
            if repeats == 1:
                continue
            runs.append((p, j - i + p))
            text = _repeat(tokens[i : i + p], repeats)
            gain = repeats * sum(map(len, tokens[i : i + p])) - len(text)
            if gain > saved:
                saved, end, part = gain, i + repeats * p, text
        parts.append(part)
        i = end
    return "".join(parts)


def _repeat(tokens: tuple[str, ...], repeats: int) -> str:
    return f"{tokens[0]}{repeats}" if len(tokens) == 1 else f"({_exact(tokens)}){repeats}"
