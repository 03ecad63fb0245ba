"""YAML as people write it: `1e-3` is a number, a key given twice is a mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid.config.options import ConfigError

DEEPEST = 50  # mappings and lists within each other
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
        raise ConfigError([f"expected a mapping, got {type(values).__name__}"], str(path))
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested mappings and lists with overrides `a.b[0].c=VALUE`, OmegaConf's dot list.

    A value is YAML and takes the place of what is there. `${...}` is not resolved.

    Raises:
        ConfigError: an override has no `=`, a path leads nowhere, or a key is given twice.
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
    """A copy of nested mappings and lists with `a.b[0].c` set; missing mappings are made.

    Raises:
        LookupError: the path leads nowhere; its argument says why.
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
            if OmegaConf.is_list(holder) and not _is_place(parts[depth], len(holder)):
                raise LookupError(f"no entry {parts[depth]!r} in a list of {len(holder)}")
        OmegaConf.update(config, path, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise LookupError(str(error).splitlines()[0]) from error
    made: Any = OmegaConf.to_container(config)
    return made


def _is_place(step: str, length: int) -> bool:
    return step.isdigit() and int(step) < length


def find_config(name: str) -> Path:
    """A file of `configs/`: below the working directory, in the source tree, or in the wheel.

    Raises:
        ConfigError: it is in none of them.
    """
    package = Path(__file__).parents[1]
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in folders)
    raise ConfigError([f"{name} is in none of {looked}"], "configs")
