"""YAML as people write it: `1e-3` is a number, a key given twice is a mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid.config.options import ConfigError

DEEPEST = 50  # mappings and lists within each other


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a key is text, found {key!r}; put it in quotes",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, for which 1e-3 (no point) is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse(text: str, where: str) -> Any:
    """YAML text -> plain values.

    Raises:
        ConfigError: it is no YAML; `where` says where it stands.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
        _refuse_circles(values, ())
        return values
    except RecursionError as error:
        raise ConfigError(["it is nested too deeply, or holds itself"], where) from error
    except ValueError as error:  # of a date, or of a number with too many digits
        raise ConfigError([f"not valid YAML: {error}"], where) from error
    except yaml.YAMLError as error:
        # PyYAML's words for text that is in no file; `where` names what it is in
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError([f"not valid YAML: {reason}"], where) from error


def _refuse_circles(values: Any, outer: tuple[int, ...]) -> None:
    """Refuse what deepens without an end: an alias to something that the alias is in."""
    if id(values) in outer or len(outer) > DEEPEST:
        raise RecursionError
    inner = values.values() if isinstance(values, dict) else values
    for value in inner if isinstance(values, (dict, list)) else ():
        _refuse_circles(value, (*outer, id(values)))


def read(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise ConfigError([f"no such file{there}"], str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot be read as text: {error}"], str(path)) from error
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError([f"expected a mapping, found {type(values).__name__}"], str(path))
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set `a.b[0].c=VALUE` in nested mappings and lists, in place; VALUE is YAML.

    Raises:
        ConfigError: an override has no `=`, or its path leads nowhere.
    """
    mistakes = []
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            mistakes.append(f"{text!r}: expected key=value, e.g. training.max_steps=10")
            continue
        try:
            set_key(values, path, parse(value, path))
        except LookupError as error:
            mistakes.append(f"{path}: {error.args[0]}")
    if mistakes:
        raise ConfigError(mistakes, "the command line")
    return values


def set_key(values: Any, path: str, value: Any) -> None:
    """Set `a.b[0].c` in nested mappings and lists, in place; mappings on the way are made.

    Raises:
        LookupError: the path leads nowhere; its argument says why.
    """
    steps = [s for s in re.split(r"[.\[\]]", path) if s]
    holder = values
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(holder, list):
            if not step.isdigit() or int(step) >= len(holder):
                raise LookupError(f"no entry {step!r} in a list of {len(holder)}")
            key: Any = int(step)
        elif isinstance(holder, dict):
            key = step
        else:
            raise LookupError(
                f"{'.'.join(steps[:depth])} holds {holder!r}, nothing to set a key in"
            )
        if last:
            holder[key] = value
        else:
            if isinstance(holder, dict) and holder.get(key) is None:
                holder[key] = {}
            holder = holder[key]
