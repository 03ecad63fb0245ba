"""The keys of a configuration class as a table, for the documentation."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter

from hybrid.config.declare import LARGEST, bounded


class Key(NamedTuple):
    """One key: name, type, default as YAML (None if required), and description."""

    name: str
    expected: str
    default: str | None
    description: str


def keys(cls: Any) -> list[Key]:
    """Return the keys of a ``Declared`` model or of an option dataclass, in declaration order."""
    if hasattr(cls, "model_fields"):
        schema = cls.model_json_schema()
        return [
            Key(
                name,
                _words(schema["properties"][name]),
                None if f.is_required() else _yaml(f.get_default(call_default_factory=True)),
                f.description or "",
            )
            for name, f in cls.model_fields.items()
        ]
    hints = typing.get_type_hints(cls, include_extras=True)
    return [_option(f, hints[f.name]) for f in dataclasses.fields(cls)]


def table(cls: Any) -> str:
    """Return the keys of a class as a Markdown table; without a column of descriptions if empty."""
    found = keys(cls)
    described = any(key.description for key in found)
    head = ["key", "expects", "default", *(["meaning"] if described else [])]
    rows = [head, ["---"] * len(head)]
    for key in found:
        default = "required" if key.default is None else f"`{key.default}`"
        rows.append([f"`{key.name}`", key.expected, default, *([key.description] * described)])
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


def _option(field: Any, hint: Any) -> Key:
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    required = default is dataclasses.MISSING
    expected = _words(TypeAdapter(bounded(hint)).json_schema())
    return Key(field.name, expected, None if required else _yaml(default), "")


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    return value if isinstance(value, str) and value else json.dumps(value)


_TYPES = {"null": "null", "string": "text", "boolean": "true or false", "object": "mapping"}


def _words(schema: dict[str, Any]) -> str:
    """Return a short description of the values that a JSON schema accepts."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_words(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return " or ".join(f"`{_yaml(choice)}`" for choice in choices)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _number(schema, "int" if kind == "integer" else "float")
    if kind == "array":
        return f"list of {_words(schema.get('items', {}))}"
    return _TYPES.get(kind or "", "mapping" if "$ref" in schema else "any value")


def _number(schema: dict[str, Any], name: str) -> str:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    parts = [f"at least {low:g}"] if low > -LARGEST else []
    parts += [f"above {schema['exclusiveMinimum']:g}"] if "exclusiveMinimum" in schema else []
    parts += [f"at most {high:g}"] if high < 1 << 16 else []
    parts += [f"below {schema['exclusiveMaximum']:g}"] if "exclusiveMaximum" in schema else []
    return " ".join([name, " and ".join(parts)]).strip()
