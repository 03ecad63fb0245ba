"""Differences between two configurations, one line for each key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

_ABSENT = object()


def changes(before: Any, present: Any, path: str = "") -> list[str]:
    """Compare two values of YAML or JSON down to the keys that differ.

    Args:
        before: nested mappings, lists and plain values.
        present: the same.
        path: of the values, as the user writes it; empty for a whole configuration.

    Returns:
        Lines ``path.to.key: was X, is Y``, sorted by key; a key that one side lacks is ``not set``.
    """
    if isinstance(before, Mapping) and isinstance(present, Mapping):
        pairs = _of_mappings(before, present, f"{path}." if path else "")
    elif isinstance(before, list) and isinstance(present, list):
        both = zip_longest(before, present, fillvalue=_ABSENT)
        pairs = ((f"{path}[{number}]", *values) for number, values in enumerate(both))
    elif before == present:
        return []
    else:
        return [f"{path}: was {_shown(before)}, is {_shown(present)}"]
    return [line for key, old, new in pairs for line in changes(old, new, key)]


def _of_mappings(
    before: Mapping[str, Any], present: Mapping[str, Any], start: str
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *present}, key=str):
        yield f"{start}{key}", before.get(key, _ABSENT), present.get(key, _ABSENT)


def _shown(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)
