"""Words for wrong names: every refusal says what was found and the nearest right thing."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the tail of a message: ``; did you mean 'x'?`` or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"


def check_range(name: str, ids: tuple[int, int]) -> None:
    """Refuse a half-open range of token ids that is empty or negative.

    Raises:
        ValueError: names the range.
    """
    if len(ids) != 2 or ids[0] < 0 or ids[1] <= ids[0]:
        raise ValueError(f"{name} must be (first, last + 1) with 0 <= first < last + 1, got {ids}")
