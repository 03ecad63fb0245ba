"""Words for wrong names: every refusal says what was found and the nearest right thing."""

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the tail of a message: ``; did you mean 'x'?`` or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}"


def id_range(name: str, ids: Sequence[int]) -> tuple[int, int]:
    """Return a half-open range of token ids as a tuple (YAML gives lists).

    Raises:
        ValueError: it is empty or negative; the message names it.
    """
    if len(ids) != 2 or ids[0] < 0 or ids[1] <= ids[0]:
        raise ValueError(f"{name} must be (first, last + 1) with 0 <= first < last + 1, got {ids}")
    return int(ids[0]), int(ids[1])


class NotFiniteError(ValueError):
    """A model's logits are NaN or infinite: there is nothing to measure."""
