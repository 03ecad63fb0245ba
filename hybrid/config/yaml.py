"""YAML loading in which ``1e-3`` is a number and duplicate keys are refused."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid.config.options import ConfigError

DEEPEST = 50  # nesting depth of mappings and lists
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"expected text as a key, got {key!r}; try it in quotes",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected each key once, got {key!r} twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which 1e-3 (without a point) is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse(text: str, where: str) -> Any:
    """Parse YAML text into plain values.

    Raises:
        ConfigError: the text is not valid YAML; ``where`` names its origin.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
        _refuse_circles(values, ())
        return values
    except RecursionError as error:
        raise ConfigError(
            [f"expected at most {DEEPEST} levels of nesting, without cycles, got more or a cycle"],
            where,
        ) from error
    except ValueError as error:  # of a date, or of a number with too many digits
        raise ConfigError([f"expected valid YAML, got {error}"], where) from error
    except yaml.YAMLError as error:
        # PyYAML's name for text without a file; ``where`` names the origin
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError([f"expected valid YAML, got {reason}"], where) from error


def _refuse_circles(values: Any, outer: tuple[int, ...]) -> None:
    """Refuse recursive values: an alias to a value that contains the alias."""
    if id(values) in outer or len(outer) > DEEPEST:
        raise RecursionError
    inner = values.values() if isinstance(values, dict) else values
    for value in inner if isinstance(values, (dict, list)) else ():
        _refuse_circles(value, (*outer, id(values)))


def read(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: the file does not exist, or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        files = folder.glob("*.y*ml") if folder.is_dir() else ()
        near = sorted(p.name for p in files if not p.name.startswith("."))
        there = f"; try one of {folder}: {', '.join(near)}" if near else "; try a file of configs/"
        got = "a folder" if path.is_dir() else "none"
        raise ConfigError([f"expected an existing file, got {got}{there}"], str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"expected a text file, got {error}"], str(path)) from error
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError([f"expected a mapping, got {type(values).__name__}"], str(path))
    return values


def read_included(given: Any, path: str | Path) -> Any:
    """Return ``given``, or if it is text, the mapping of the YAML file of this name.

    The file is looked up from the working directory, then beside ``path``, the file that names it.

    Raises:
        ConfigError: no such file, or it does not hold a mapping.
    """
    if not isinstance(given, str):
        return given
    places = [Path(given), Path(path).parent / given]
    return read(next((place for place in places if place.is_file()), places[0]))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested mappings and lists with overrides ``a.b[0].c=VALUE``, OmegaConf's dot
    list.

    A value is YAML and replaces the existing one. ``${...}`` is not resolved.

    Raises:
        ConfigError: an override has no ``=``, a path does not exist, or a key is given twice.
    """
    mistakes = []
    seen: set[str] = set()
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            mistakes.append(f"{text!r}: expected key=value; try training.max_steps=10")
            continue
        if path in seen:
            mistakes.append(f"{path}: expected one value, got two; try the last one alone")
        seen.add(path)
        try:
            values = with_key(values, path, parse(value, path))
        except LookupError as error:
            mistakes.append(f"{path}: {error.args[0]}")
    if mistakes:
        raise ConfigError(mistakes, "the command line")
    return values


def with_key(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested mappings and lists with ``a.b[0].c`` set; create missing mappings.

    Raises:
        LookupError: the path does not exist; the argument has the reason.
    """
    if not _PATH.fullmatch(path):
        raise LookupError(
            "expected a path of keys; try one like training.max_steps, data[0].weight"
        )
    parts = re.findall(r"[^.\[\]]+", path)
    try:
        config = OmegaConf.create(values, flags={"allow_objects": True})
        for depth in range(1, len(parts)):
            holder: Any = OmegaConf.select(config, ".".join(parts[:depth]))
            if holder is not None and not OmegaConf.is_config(holder):
                where = ".".join(parts[:depth])
                raise LookupError(f"expected a mapping at {where}, got {holder!r}")
            entries = len(holder) if holder is not None and OmegaConf.is_list(holder) else None
            if entries is not None and not _is_place(parts[depth], entries):
                raise LookupError(f"no entry {parts[depth]!r} in a list of {entries}")
        OmegaConf.update(config, path, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise LookupError(str(error).splitlines()[0]) from error
    made: Any = OmegaConf.to_container(config)
    return made


def _is_place(step: str, length: int) -> bool:
    return step.isdigit() and int(step) < length


def find_config(name: str) -> Path:
    """Find a file of ``configs/``: in the working directory, in the source tree, or in the wheel.

    Raises:
        ConfigError: no folder has it.
    """
    package = Path(__file__).parents[1]
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in folders)
    raise ConfigError([f"{name}: expected a file in one of {looked}, got none"], "configs")
