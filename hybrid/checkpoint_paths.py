"""Checks of a checkpoint's files before other code reads them.

transformers accepts any JSON where it expects an object, and its errors do not name the file.
Checkpoints are untrusted: an index, a tokenizer config or a symbolic link in one must not cause
other files of this machine to be read or copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hybrid.files import read_json

MANIFEST = "manifest.json"  # of a checkpoint, written last
CHAT_TEMPLATES = "additional_chat_templates"
# Files that transformers and PEFT read as JSON objects, beside the indexes of weights.
OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)


def inside(folder: str | Path, name: str, named_by: str = "") -> Path:
    """Return the path of a file of a checkpoint, from its name relative to the folder.

    Args:
        folder: the checkpoint.
        name: name in a file of the checkpoint; may be in a subfolder.
        named_by: the file that contains the name, for the message.

    Raises:
        ValueError: an absolute path, a path with ``..``, or a symbolic link that leaves the folder.
            Links of a hub cache may lead to the blobs of the same repository.
    """
    where = f"{Path(folder) / named_by}: " if named_by else f"{folder}: "
    parts = (PurePosixPath(name), PureWindowsPath(name))
    if (
        any(part.is_absolute() or part.drive or ".." in part.parts for part in parts)
        or "\0" in name
    ):
        raise ValueError(
            f"{where}expected a file in the checkpoint's folder, got {name!r}, which leaves it"
        )
    path = Path(folder) / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a cycle of links, or a name that is too long
        raise ValueError(f"{where}expected a readable path, got {name!r}: {error}") from error
    if not target.is_relative_to(_root(Path(folder).resolve())):
        raise ValueError(
            f"{path}: expected a file in the checkpoint's folder, got a symbolic link to {target},"
            " which leaves it; copy the file"
        )
    return path


def check_folder(folder: str | Path, _seen: frozenset[Path] = frozenset()) -> None:
    """Refuse a checkpoint with a damaged file or a path that leaves its folder, before it is loaded.

    Checks that JSON files hold objects, symbolic links, names in indexes, in ``tokenizer_config.json``
    and in ``auto_map``, and also the folder of an adapter's base model.

    Raises:
        ValueError: the first such link, name or file; or the folder of a run that is not finished.
    """
    folder = Path(folder)
    refuse_unfinished(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and (path.name == CHAT_TEMPLATES or not path.is_dir()):
            inside(folder, path.name)
    if (folder / CHAT_TEMPLATES).is_dir():
        for path in sorted((folder / CHAT_TEMPLATES).iterdir()):
            inside(folder, f"{CHAT_TEMPLATES}/{path.name}")
    check_objects(folder)
    for file, name in _names(folder):
        inside(folder, name, file)
    base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    seen = _seen | {folder.resolve()}
    if isinstance(base, str) and _is_dir(base) and Path(base).resolve() not in seen:
        check_folder(base, seen)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint of a run that is not finished; None for any other folder.

    Complete checkpoints, which have a manifest, come before others.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return None
    found = [
        (path.with_name(MANIFEST).is_file(), int(path.parent.name.rpartition("-")[2]), path.parent)
        for path in folder.glob("checkpoint-*/config.json")
        if path.parent.name.rpartition("-")[2].isdecimal()
    ]
    return max(found)[2] if found else None


def refuse_unfinished(folder: str | Path) -> None:
    """Refuse the folder of a run that is not finished, which has checkpoints but no model.

    Raises:
        ValueError: names the newest checkpoint.
    """
    if newest := newest_checkpoint(folder):
        raise ValueError(f"{folder}: not finished; try {newest}, or run the training again")


def check_objects(folder: Path) -> None:
    """Read each JSON file that must hold an object.

    Raises:
        ValueError: the first file that is none, with what is wrong with it: no JSON, JSON of another
            type, a key with two values, a folder or a link to nothing in its place.
    """
    for path in [*(folder / name for name in OBJECTS), *sorted(folder.glob("*.index.json"))]:
        if path.is_symlink() or path.exists():
            read_json(path, unique=True)
    for path in sorted(folder.glob("*.index.json")):
        if not isinstance(shards := read_json(path).get("weight_map"), dict):
            raise ValueError(
                f"{path}: weight_map: expected an object of tensors and their files, got"
                f" {type(shards).__name__}"
            )


def check_weights(source: str) -> str:
    """``check_source`` for weights that are loaded: their files are complete, too.

    Raises:
        ValueError: as ``check_folder``, or a file of weights without a readable header or with fewer
            bytes than it lists.
    """
    from safetensors import SafetensorError, safe_open

    check_source(source)
    for path in sorted(Path(source).glob("*.safetensors")) if _is_dir(source) else ():
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
    return source


def check_source(source: str) -> str:
    """Return the name of a model or tokenizer unchanged, after ``check_folder`` if it is a folder."""
    if _is_dir(source):
        check_folder(source)
    return source


def _root(folder: Path) -> Path:
    """Return the folder that links may not leave: the checkpoint, or its repository in a hub cache."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return folder


def _names(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, name in it)."""
    for path in sorted(folder.glob("*.index.json")):
        shards = _read(path).get("weight_map")
        for name in sorted(_texts(shards)):
            yield path.name, name
    for file in ("config.json", "tokenizer_config.json"):
        values = _read(folder / file)
        for name in sorted(_texts(values.get("auto_map"))):
            # "repository--module.Class"; a module of this folder has no repository
            yield file, name.rpartition("--")[2].rpartition(".")[0]
        for key, value in values.items():
            if key.endswith(("_file", "_tokenizer_files")):
                # paths of the author's machine in published files, which are never read
                yield from ((file, name) for name in _texts(value) if _is_file(folder, name))


def _texts(value: Any) -> set[str]:
    """Return every string in a JSON value, except keys."""
    if isinstance(value, str):
        return {value}
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {text for item in within for text in _texts(item)}


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file is missing or invalid, which its readers report."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False


def _is_dir(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False
