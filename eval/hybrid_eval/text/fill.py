"""Fill a prompt with as many units of filler as fit, counting real tokens."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple


class Filled(NamedTuple):
    """Number of units that fit, their tokens, and the tokens of the next unit."""

    units: int
    tokens: int
    next_tokens: int


def cumulate(unit_tokens: Iterable[int]) -> list[int]:
    """Return the tokens of the first 0, 1, 2 ... units, at least one token per unit."""
    return [0, *accumulate(max(1, tokens) for tokens in unit_tokens)]


def alike(unit_tokens: int, most: int) -> range:
    """Return what :func:``cumulate`` does for ``most`` units of as many tokens each."""
    step = max(1, unit_tokens)
    return range(0, step * most + 1, step)


def _guess(prefix: Sequence[int], units: int, room: int) -> int:
    """Return the largest number of units that adds at most ``room`` tokens (or takes off -room)."""
    return max(bisect_right(prefix, prefix[units] + room) - 1, 0)


def _walk(measure: Callable[[int], int], units: int, room: int, most: int) -> int:
    """Return what :func:``_guess`` does, from units measured one by one."""
    while room < 0 and units > 0:
        units -= 1
        room += measure(units)
    while units < most and measure(units) <= room:
        room -= measure(units)
        units += 1
    return units


def fill(
    count: Callable[[int], int],
    prefix: Sequence[int],
    budget: int,
    *,
    minimum: int,
    what: str,
    measure: Callable[[int], int] | None = None,
) -> Filled:
    """Return the largest number of units whose prompt has at most ``budget`` tokens.

    Tokens of units are nearly additive, so the estimate from ``prefix`` is nearly exact and a
    sample needs one or two counts of a full prompt instead of a search.

    Args:
        count: tokens of the prompt with that many units, counted on the prompt itself.
        prefix: estimated tokens of the first 0, 1, 2 ... units, rising by one at least; the last
            is that of all there are.
        budget: maximum tokens of the prompt.
        minimum: minimum number of units of a valid sample.
        what: name for the error.
        measure: tokens of one unit, counted on the unit; asked for the few units around the end
            where ``prefix`` comes from an average.

    Raises:
        ValueError: not even ``minimum`` units fit.
    """
    most = len(prefix) - 1
    fits: Filled | None = None
    too_many = most + 1
    # the shortest prompt says, for little, how much surrounds the units
    units = minimum
    while True:
        tokens = count(units)
        if measure is not None and units > minimum:
            target = _walk(measure, units, budget - tokens, most)
        else:
            target = _guess(prefix, units, budget - tokens)
        if tokens > budget:
            too_many = units
        else:
            following = 0
            if units < most:
                step = prefix[units + 1] - prefix[units]
                following = step if measure is None else measure(units)
            fits = Filled(units, tokens, following)
        floor = minimum - 1 if fits is None else fits.units
        if too_many - floor == 1 or (tokens <= budget and target <= units):
            break
        # an estimate that leads out of what is still open was wrong: halve instead
        units = target if floor < target < too_many else (floor + too_many) // 2
    if fits is None:
        raise ValueError(
            f"{what}: the shortest prompt takes {tokens} tokens, only {budget} are left of the "
            "length after room for the answer; ask for a greater length"
        )
    if fits.units + 1 == too_many <= most:
        # seen not to fit, whatever the estimate says
        return fits._replace(next_tokens=max(fits.next_tokens, budget - fits.tokens + 1))
    return fits
