"""Configuration classes checked by pydantic, with one line of text for each mistake.

A configuration is a class whose annotations are the types of its keys: a ``Declared`` model, or a
dataclass. ``build`` creates an instance from plain values, as read from YAML or JSON. Types are
strict: a bool is not an int, text is not a number, NaN and infinity are refused, and so are numbers
beyond ``LARGEST`` and ``LARGEST_FLOAT``. Each mistake is a line ``path.to.key: expected X, got Y``,
followed by ``; try Z`` if a similar valid value exists.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, Required, TypedDict

from hybrid.config.options import ConfigError, did_you_mean, nearest

T = TypeVar("T")

LARGEST = 1 << 40
"""Bound on the magnitude of every number: no run has more steps, rows or tokens."""

LARGEST_FLOAT = 3.4e38
"""Bound on the magnitude of a bare ``float``: the largest float32."""

LARGEST_SIZE = 1 << 24
"""Bound on heads, widths and windows of one layer."""

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

# Types of keys with their bounds.
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Size0 = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
Size2 = Annotated[int, Field(ge=2, le=LARGEST_SIZE)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Count0 = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Negative = Annotated[float, Field(lt=0, ge=-LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
ShareOrAll = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_range(values: Sequence[float]) -> Sequence[float]:
    if len(values) != 2 or not 0 <= values[0] <= values[1]:
        raise ValueError("[low, high] with 0 <= low <= high")
    return values


MaybeInf = Annotated[float, Field(allow_inf_nan=True)]
Range = Annotated[list[Number] | tuple[Number, ...], AfterValidator(_check_range)]
Limits = Annotated[list[MaybeInf] | tuple[MaybeInf, ...], AfterValidator(_check_range)]


class Declared(BaseModel):
    """Base of configuration classes: strict types, no unknown keys, immutable instances."""

    model_config = STRICT

    @classmethod
    def place_of(cls, key: str) -> str | None:
        """Return the path of a key that belongs deeper in the configuration, for suggestions."""
        return None

    @classmethod
    def unknown_key(cls, key: str) -> str:
        """Return the text after the name of an unknown key."""
        if (deeper := cls.place_of(key)) is not None:
            return f"unknown key, did you mean {deeper!r}?"
        return f"unknown key, {did_you_mean(key, cls.model_fields)}"


def refuse(lines: Sequence[str]) -> None:
    """Raise ``lines`` within a validator, if there are any.

    A line begins with a key relative to the validated value, ``key: expected ...``, or with ``: ``
    for the value itself. ``build`` prepends the path.
    """
    if lines:
        raise PydanticCustomError("mistakes", "{lines}", {"lines": list(lines)})


def parse(cls: type[T], values: Any, title: str) -> T:
    """Return an instance of a declared class.

    Raises:
        ConfigError: with one line for each mistake.
    """
    mistakes: list[str] = []
    made = build(cls, values, "", mistakes)
    if made is None:
        raise ConfigError(mistakes, title)
    return made


def build(cls: type[T], values: Any, path: str, mistakes: list[str]) -> T | None:
    """Return an instance of a declared class or dataclass, or None after adding to ``mistakes``."""
    if issubclass(cls, BaseModel):
        lines, made = _validate(cls, dict(cls.model_fields), values, path)
        mistakes += lines
        return typing.cast(Any, made)
    schema, keys = _keys_of(cls)
    lines, checked = _validate(schema, keys, values, path)
    mistakes += lines
    return None if checked is None else cls(**checked)


@lru_cache(maxsize=256)
def _keys_of(cls: Any) -> tuple[Any, dict[str, Any]]:
    """Return the schema that pydantic validates a class with, and the annotations of its keys."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    required = frozenset(
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    keys = {f.name: bounded(hints[f.name], most=LARGEST_SIZE) for f in fields}
    return _typed_dict(cls, tuple(keys.items()), required), keys


def check_keys(
    owner: type,
    hints: Mapping[str, Any],
    values: Any,
    path: str = "",
) -> tuple[list[str], dict[str, Any] | None]:
    """Check the keys of a mapping against annotations.

    Args:
        owner: class of the annotations, by which the pydantic adapter is cached.
        hints: annotation of each allowed key.
        values: the mapping.
        path: path of the mapping in the configuration; the beginning of each line.

    Returns:
        One line for each mistake, and the checked values, or None after a mistake.
    """
    schema = _typed_dict(owner, tuple(hints.items()), frozenset())
    return _validate(schema, hints, values, path)


@lru_cache(maxsize=256)
def _typed_dict(owner: type, hints: tuple[tuple[str, Any], ...], required: frozenset[str]) -> Any:
    keys = {name: (Required if name in required else NotRequired)[hint] for name, hint in hints}
    made = TypedDict(owner.__name__, keys)  # type: ignore[misc]
    made.__pydantic_config__ = STRICT | ConfigDict(arbitrary_types_allowed=True)
    return made


@lru_cache(maxsize=512)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def bounded(hint: Any, *rules: Any, most: int = LARGEST) -> Any:
    """Return an annotation with ``rules`` and bounds on each bare ``int`` and ``float`` in it."""
    if hint is int or hint is float:
        limit = most if hint is int else LARGEST_FLOAT
        return Annotated[(hint, Field(ge=-limit, le=limit), *rules)]
    origin: Any = get_origin(hint)
    parts = get_args(hint)
    if origin in (Union, types.UnionType):
        return Union[tuple(bounded(part, *rules, most=most) for part in parts)]  # noqa: UP007
    if origin in (list, dict, tuple) and parts:
        container: Any = origin
        return container[
            tuple(part if part is ... else bounded(part, *rules, most=most) for part in parts)
        ]
    return hint


def _validate(
    schema: Any, fields: Mapping[str, Any], values: Any, path: str
) -> tuple[list[str], Any]:
    try:
        return [], _adapter(schema).validate_python(values)
    except ValidationError as error:
        owner = schema if isinstance(schema, type) and issubclass(schema, Declared) else None
        return _lines(error, values, path, fields, owner), None
    except RecursionError:
        return [f"{path}: expected values without cycles, got one that contains itself"], None


def _lines(
    error: ValidationError,
    values: Any,
    path: str,
    fields: Mapping[str, Any],
    owner: type[Declared] | None,
) -> list[str]:
    """Return one line for each location with a mistake, in pydantic's order."""
    places: dict[tuple, list[Any]] = {}
    for mistake in error.errors(include_url=False):
        places.setdefault(_place(mistake, values), []).append(mistake)
    lines: list[str] = []
    for place, mistakes in places.items():
        # Of a union, report only the branch that matched deepest.
        if any(other[: len(place)] == place and other != place for other in places):
            mistakes = [m for m in mistakes if m["type"] == "mistakes"]
        where = _join(path, place)
        for mistake in mistakes:
            if mistake["type"] == "mistakes":
                lines += [_below(where, line) for line in mistake["ctx"]["lines"]]
        if others := [m for m in mistakes if m["type"] != "mistakes"]:
            if others[0]["type"] == "extra_forbidden" and len(place) == 1 and owner is not None:
                explained = owner.unknown_key(str(place[0]))
            else:
                explained = _explain(others, place, fields)
            lines.append(f"{where or 'the config'}: {explained}")
    return lines


def _place(mistake: Any, values: Any) -> tuple:
    """Return the part of a location that exists in the values, without names of union branches."""
    place: list[Any] = []
    for step in mistake["loc"]:
        if isinstance(values, Mapping) and step in values:
            place.append(str(step))  # an int is an index
        elif isinstance(values, (list, tuple)) and isinstance(step, int) and step < len(values):
            place.append(step)
        else:
            continue
        values = values[step]
    if mistake["type"] == "missing":
        place.append(mistake["loc"][-1])
    return tuple(place)


def _join(path: str, place: Iterable[Any]) -> str:
    for step in place:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path


def _below(where: str, line: str) -> str:
    # A LayoutError continues with a column after its name.
    return where + line if line.startswith((":", "[", ",")) or not where else f"{where}.{line}"


def _explain(mistakes: list[Any], place: tuple, fields: Mapping[str, Any]) -> str:
    """Return the text after the path: the expected value, the actual one, and a suggestion."""
    first = mistakes[0]
    value = first["input"]
    if first["type"] == "extra_forbidden":
        return f"unknown key, {did_you_mean(str(place[-1]), _names_at(fields, place[:-1]))}"
    if first["type"] == "missing":
        return "expected a value, got none"
    expected = list(dict.fromkeys(_expected(mistake) for mistake in mistakes))
    is_type = all(mistake["type"].endswith(_TYPES) for mistake in mistakes)
    line = f"expected {' or '.join(expected)}, got {show(value, with_type=is_type)}"
    choices = [m["ctx"]["expected"] for m in mistakes if m["type"] in ("literal_error", "enum")]
    names = re.findall(r"'([^']*)'", " ".join(choices))
    near = nearest(value, names) if isinstance(value, str) else None
    return line if near is None else f"{line}; try {near!r}"


def _names_at(fields: Mapping[str, Any], place: Iterable[Any]) -> list[str]:
    """Return the names of the keys allowed at a location."""
    for step in place:
        if isinstance(field := fields.get(step), (type(None), str)):
            continue
        hint = getattr(field, "annotation", field)
        inner = next((part for part in _parts(hint) if hasattr(part, "model_fields")), None)
        fields = fields if inner is None else inner.model_fields
    return list(fields)


def _parts(hint: Any) -> Iterable[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


_TYPES = ("_type", "none_required", "is_instance_of")

MOST_CHOICES = 16  # listed in a message

_WORDS = {
    "int": "int",
    "float": "float",
    "string": "str",
    "bool": "bool",
    "none_required": "null",
    "list": "list",
    "tuple": "list",
    "dict": "mapping",
    "model": "mapping of options",
    "finite_number": "finite number",
    "string_too_short": "non-empty str",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "one of {expected}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "is_instance_of": "{class}",
    "string_pattern_mismatch": "text like {pattern}",
}


def _expected(mistake: Any) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    words = _WORDS.get(kind) or _WORDS.get(kind.removesuffix("_type"))
    if words is None:
        return mistake["msg"]
    if len(choices := str(context.get("expected", "")).split(", ")) > MOST_CHOICES:
        context = {
            "expected": f"{', '.join(choices[:MOST_CHOICES])}, ... ({len(choices) + 1} in all)"
        }
    numbers = {
        k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()
    }
    return words.format(**numbers).replace("least 1 entries", "least 1 entry")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def show(value: Any, with_type: bool = True) -> str:
    """Format a value for an error message: shortened, with its type if ``with_type``."""
    if value is None:
        return "null"
    text = _SHORT.repr(value)
    return f"{type(value).__name__} {text}" if with_type else text
