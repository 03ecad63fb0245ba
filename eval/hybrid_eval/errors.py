"""Error messages with suggestions."""

import difflib
import re
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: ``; did you mean 'x'?`` or the list of known names."""
    names = sorted(known)
    close = closest(name, names)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(names)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name``; shared words count before shared letters."""
    asked = _words(name)
    scores = {}
    for candidate in sorted(known):
        likeness = difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        common = asked & _words(candidate)
        if likeness >= 0.5 or (asked and common == asked):
            scores[candidate] = (len(common), likeness, candidate)
    return max(scores, key=lambda candidate: scores[candidate], default=None)


def _words(name: str) -> set[str]:
    """Return the words of a name, in the singular."""
    return {word.rstrip("s") for word in re.split(r"[\W_]+", name.lower()) if word}


def id_range(name: str, ids: Sequence[int]) -> tuple[int, int]:
    """Return a half-open range of token ids as a tuple (YAML gives lists).

    Raises:
        ValueError: it is empty or negative; the message names it.
    """
    if len(ids) != 2 or ids[0] < 0 or ids[1] <= ids[0]:
        raise ValueError(f"{name} must be (first, last + 1) with 0 <= first < last + 1, got {ids}")
    return int(ids[0]), int(ids[1])


class NotFiniteError(ValueError):
    """The logits of a model are NaN or infinite."""
