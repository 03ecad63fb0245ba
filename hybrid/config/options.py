"""Configuration errors, and suggestions for misspelt names.

The allowed values of a configuration are declared by the types of its classes, which
``hybrid.config.declare`` checks.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any


def option(default: Any = dataclasses.MISSING, *, help: str, **kwargs: Any) -> Any:
    """Return a dataclass field whose metadata holds its description, ``help``."""
    return dataclasses.field(default=default, metadata={"help": help}, **kwargs)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name``, or None.

    Shared words count before shared letters: ``num_layer`` is nearer to ``num_hidden_layers`` than
    to ``mixers``.
    """
    name = str(name)  # keys and values may have other types
    asked = words_of(name)
    scores = {}
    for candidate in sorted(str(k) for k in known):
        likeness = difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        common = asked & words_of(candidate)
        if likeness >= 0.6 or (asked and common == asked):
            scores[candidate] = (len(common), likeness, candidate)
    return max(scores, key=lambda k: scores[k], default=None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known name, or the list of known names."""
    known = sorted(str(k) for k in known)
    near = nearest(name, known)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known: {', '.join(first_few(known, 20))}" if known else "none are known here"


def words_of(name: str) -> set[str]:
    """Return the words of a name, in the singular."""
    return {word.rstrip("s") for word in re.split(r"[_.\-\s]+", name.lower()) if word}


def first_few(lines: list[str], most: int = 8) -> list[str]:
    """Return the first lines of an error message, and a last one that counts the omitted ones."""
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


class ConfigError(ValueError):
    """One or more mistakes in a configuration.

    Attributes:
        mistakes: one line for each, ``path.to.key: expected X, got Y; try Z``.
        title: the file, or another place of the mistakes.
    """

    def __init__(self, mistakes: list[str], title: str = "the config") -> None:
        self.mistakes = list(mistakes)
        self.title = title
        if len(mistakes) == 1:
            super().__init__(f"{title}: {mistakes[0]}")
            return
        # Lines with a caret keep their line breaks, indented.
        items = ["\n    ".join(self._item(line)) for line in mistakes]
        super().__init__("\n    ".join([f"{title} has {len(items)} mistakes:", *items]))

    def named(self, file: str) -> ConfigError:
        """Return the error with the name of the file, if it does not name a place yet."""
        return ConfigError(self.mistakes, file) if self.title == "the config" else self

    @staticmethod
    def _item(mistake: str) -> list[str]:
        first, *rest = mistake.splitlines()
        return [f"- {first}", *(f"  {line}" for line in rest)]
