"""Search for the shortest layout string of a sequence of layers."""

from __future__ import annotations

from functools import lru_cache

_EXACT = 256
"""Longest sequence for which the string is provably the shortest."""

_LONGEST_GROUP = 64
"""Longest group that the search looks for in longer sequences."""

# A cost is a single integer: characters first, then counts, so that of two equally short strings
# the plainer one wins (LL, not L2). A sequence of _EXACT layers cannot hold this many counts.
_CHARACTER = 2 * _EXACT


@lru_cache(maxsize=512)
def shortest(tokens: tuple[str, ...]) -> str:
    """Return the shortest layout string for a sequence of layers.

    A layout is a row of items, and an item is a token or a repeated group. So the best string from
    a position on is its best first item, followed by the best string from the end of that item on.
    Groups that are themselves repetitions are never needed (``((LS)2)3`` is ``(LS)6``), and few
    others start at any one position, so that the time grows with the square of the length (15 ms for
    128 layers).

    Args:
        tokens: each layer as it is written alone: "L", "[MS]", "-".

    Returns:
        A string that parses to ``tokens``. No shorter one exists if there are at most 256 of them.
        Beyond, only groups of up to 64 layers are looked for, each repeated as often as it can be;
        never longer than the tokens written out.
    """
    n = len(tokens)
    period = _smallest_period(tokens)
    if n > _EXACT and period < n:
        return _repeat(tokens[:period], n // period)
    longest = n // 2 if n <= _EXACT else _LONGEST_GROUP
    # run[p]: how many tokens from here on equal the token p later
    run = [0] * (longest + 1)
    cost = [0] * (n + 1)
    first = [(tokens[i], i + 1) for i in range(n)]  # of the best string: its item, the item's end
    for i in range(n - 1, -1, -1):
        cost[i] = len(tokens[i]) * _CHARACTER + cost[i + 1]
        roots: list[int] = []
        for p in range(1, min(longest, n - 1 - i) + 1):
            run[p] = run[p] + 1 if tokens[i] == tokens[i + p] else 0
            repeats = run[p] // p + 1
            if repeats < 2 or any(p % q == 0 and run[q] >= p - q for q in roots):
                continue
            roots.append(p)
            # fewer repeats than possible can leave a better rest: AAAB is needed whole in A2(AAAB)2
            for k in range(repeats, 1 if n <= _EXACT else repeats - 1, -1):
                text = _repeat(tokens[i : i + p], k)
                total = len(text) * _CHARACTER + _counts(text) + cost[i + k * p]
                if (total, -k * p) < (cost[i], i - first[i][1]):  # of equals the longest first item
                    cost[i], first[i] = total, (text, i + k * p)
    parts, i = [], 0
    while i < n:
        text, i = first[i]
        parts.append(text)
    return "".join(parts)


def _repeat(tokens: tuple[str, ...], repeats: int) -> str:
    return f"{tokens[0]}{repeats}" if len(tokens) == 1 else f"({shortest(tokens)}){repeats}"


def _counts(text: str) -> int:
    """Number of counts in a string; no two stand side by side."""
    return sum(a.isdigit() and not b.isdigit() for a, b in zip(text, text[1:] + " ", strict=True))


def _smallest_period(tokens: tuple[str, ...]) -> int:
    """Length of the shortest group that, repeated, is the whole sequence (Knuth-Morris-Pratt)."""
    border = [0] * (len(tokens) + 1)
    matched = 0
    for i in range(1, len(tokens)):
        while matched and tokens[i] != tokens[matched]:
            matched = border[matched]
        matched += tokens[i] == tokens[matched]
        border[i + 1] = matched
    period = len(tokens) - border[-1]
    return period if period and len(tokens) % period == 0 else len(tokens)
