"""Typed options: a dataclass from a plain mapping, every mistake named, none lost.

Configs reach us as YAML or JSON. `build` turns one mapping into one options dataclass and collects
every mistake (unknown key, wrong type, value outside its choices) as a line of text that starts with
the path to the key, so that a config with ten mistakes is reported once, with ten lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

LARGEST = 1 << 32  # of any number in a config


def option(default: Any = dataclasses.MISSING, *, help: str, **kwargs: Any) -> Any:
    """A dataclass field with its explanation beside it; `help` is what `hybrid mixers NAME` prints."""
    return dataclasses.field(default=default, metadata={"help": help}, **kwargs)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest right name, or the list of right names."""
    known = sorted(str(k) for k in known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        # num_layer: num_hidden_layers has both words, mixers has letters
        near.sort(key=lambda k: -_common_words(name, k))
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none are known here"


def _common_words(name: str, known: str) -> int:
    """Words that two names share; a plural is the same word."""
    first, second = (
        {word.rstrip("s") for word in text.lower().split("_")} for text in (name, known)
    )
    return len(first & second)


def first_few(lines: list[str], most: int = 8) -> list[str]:
    """The first lines of an error message, and a last one that says how many more there are."""
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


class ConfigError(ValueError):
    """One or more mistakes in a config; `mistakes` holds one line of text for each."""

    def __init__(self, mistakes: list[str], title: str = "the config") -> None:
        self.mistakes = list(mistakes)
        count = len(self.mistakes)
        head = f"{title} has {count} mistake{'s' if count > 1 else ''}:"
        # lines with a caret of their own keep their shape, indented
        super().__init__(
            "\n    ".join([head, *("\n    ".join(self._item(line)) for line in mistakes)])
        )

    @staticmethod
    def _item(mistake: str) -> list[str]:
        first, *rest = mistake.splitlines()
        return [f"- {first}", *(f"  {line}" for line in rest)]


def build(cls: type[T], values: Any, path: str, mistakes: list[str]) -> T | None:
    """Build the dataclass `cls` from a mapping; append to `mistakes` and return None where it fails."""
    if not isinstance(values, Mapping):
        mistakes.append(
            f"{path}: expected a mapping of options, found {type(values).__name__} {values!r}"
        )
        return None
    before = len(mistakes)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            mistakes.append(f"{where}: unknown key, {did_you_mean(str(key), fields)}")
            continue
        if problem := type_problem(value, hints[key]) or number_problem(value):
            mistakes.append(f"{where}: {problem}")
            continue
        checked[key] = coerce(value, hints[key])
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            mistakes.append(f"{path + '.' if path else ''}{name}: required, and not given")
    return cls(**checked) if len(mistakes) == before else None


def number_problem(value: Any) -> str | None:
    """What is wrong with a number that nobody can mean, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, found {value}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"expected a whole number of at most {LARGEST}, found {value}"
    return None


def coerce(value: Any, hint: Any) -> Any:
    """An int where a float is wanted becomes a float (YAML writes 10000 for 1e4)."""
    wants_float = hint is float or (float in get_args(hint) and int not in get_args(hint))
    if wants_float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def type_problem(value: Any, hint: Any) -> str | None:
    """What is wrong with `value` for the annotation `hint`, or None."""
    if hint is Any:
        return None
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        problems = [type_problem(value, part) for part in get_args(hint)]
        if None in problems:
            return None
        choices = [p for part, p in zip(get_args(hint), problems, strict=True) if _is_choice(part)]
        return choices[0] if choices else f"expected {_name(hint)}, found {_found(value)}"
    if origin is Literal:
        if value in get_args(hint):
            return None
        near = did_you_mean(str(value), [str(a) for a in get_args(hint)])
        return f"expected one of {', '.join(map(repr, get_args(hint)))}, found {value!r}; {near}"
    if origin in (list, tuple, dict, Mapping):
        base = dict if origin is Mapping else origin
        accepted = (list, tuple) if base in (list, tuple) else (base,)
        if not isinstance(value, accepted):
            return _mismatch(value, hint)
        if base is list and get_args(hint) and get_args(hint)[0] in (int, float, str, bool):
            problems = [type_problem(item, get_args(hint)[0]) for item in value]
            return next((f"in the list: {p}" for p in problems if p), None)
        return None
    if hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if good else _mismatch(value, hint)
    if hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
        return None if good else _mismatch(value, hint)
    if hint is type(None):
        return None if value is None else _mismatch(value, hint)
    if isinstance(hint, type):
        return None if isinstance(value, hint) else _mismatch(value, hint)
    return None


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _mismatch(value: Any, hint: Any) -> str:
    return f"expected {_name(hint)}, found {_found(value)}"


def _found(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r}"


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint))
