"""Checks that paths in the files of a checkpoint stay inside its folder."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint with a path that leaves its folder.

    Links of a hub cache may lead to the blobs of the same repository.

    Raises:
        ValueError: a symbolic link that leaves the folder, or such a name in an index, in
            ``tokenizer_config.json`` or in ``auto_map``.
    """
    root = folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            root = parent.parent
            break
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.is_symlink() and (not path.is_dir() or path.name == "additional_chat_templates"):
            _check(folder, path.relative_to(folder).as_posix(), root, path)
    for file, name in _names(folder):
        _check(folder, name, root, folder / file)


def _check(folder: Path, name: str, root: Path, named_by: Path) -> None:
    parts = (PurePosixPath(name), PureWindowsPath(name))
    leaves = any(part.is_absolute() or part.drive or ".." in part.parts for part in parts)
    try:
        leaves = leaves or not (folder / name).resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # a cycle of links, or an invalid name
        leaves = True
    if leaves:
        raise ValueError(
            f"{named_by}: expected a file in the checkpoint's folder, got {name!r}, which leaves it;"
            " copy the file"
        )


def _names(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, name in it)."""
    for path in sorted(folder.glob("*.index.json")):
        yield from ((path.name, name) for name in _texts(_read(path).get("weight_map")))
    for file in ("config.json", "tokenizer_config.json"):
        for key, value in _read(folder / file).items():
            for name in _texts(value):
                if key == "auto_map":  # "repository--module.Class"
                    yield file, name.rpartition("--")[2].rpartition(".")[0]
                # paths of the author's machine in published files, which are never read
                elif key.endswith(("_file", "_tokenizer_files")) and _is_file(folder / name):
                    yield file, name


def _texts(value: Any) -> set[str]:
    """Return every string in a JSON value, except keys."""
    if isinstance(value, str):
        return {value}
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in within for text in _texts(item)}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):  # reported by the readers of the file
        return {}
    return values if isinstance(values, dict) else {}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
