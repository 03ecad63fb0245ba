"""Cached results on disk, written atomically and reused only for the same measurement."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from .identity import digest, path_digest


@lru_cache(maxsize=1)
def _own_code() -> str:
    """Return the hash of this package, so that a changed task is measured again."""
    return path_digest(Path(__file__).parent)


def _file_name(words: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in words)


def place(out: Path, model: str, fingerprint: str, task: str, key: Any) -> Path:
    """Return the file of a result.

    Args:
        out: folder of the run.
        model: name of the model, for readable file names.
        fingerprint: hash of the model.
        task: name of the task.
        key: everything else that the result depends on, as JSON values.
    """
    name = digest(fingerprint, json.dumps(key, sort_keys=True), _own_code())[:16]
    folder = f"{_file_name(model)}-{fingerprint[:16]}"
    return out / "cache" / folder / f"{_file_name(task)}-{name}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result with a checksum atomically, through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, allow_nan=False)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    whole = json.dumps({"checksum": digest(text), "result": result}, indent=1, allow_nan=False)
    part.write_text(whole + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if digest(json.dumps(found["result"])) == found["checksum"]:
            return found["result"]
        why = "its checksum is wrong"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: damaged cached result ({why}); delete the file to measure again")
