"""Atomic and durable file writing.

A file is written under a temporary name, flushed, synced to disk, and its size is checked. Only
then is it renamed. So after a full disk or a power failure the old file, or no file, exists; never
an incomplete one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

UNFINISHED = ".unfinished"


def check_new_folder(out: str | Path) -> None:
    """Check that a folder does not exist yet, or is empty.

    Raises:
        ValueError: it exists and has files, or is a file.
    """
    out = Path(out)
    if any(out.iterdir()) if out.is_dir() else os.path.lexists(out):
        raise ValueError(f"{out}: exists already; name a folder that does not, or an empty one")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` if the block ends without an error.

    Raises:
        OSError: the disk is full or missing; ``path`` is unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            expected = file.tell()
        size = unfinished.stat().st_size
        if size != expected:
            raise OSError(f"{path}: expected {expected} bytes written, got {size}")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write a JSON file; ``options`` are those of ``json.dumps``."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n")


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write a .npy file.

    ``numpy.save`` writes through a separate C stream, whose last block is lost without an error
    when the disk is full.
    """
    array = np.ascontiguousarray(array)
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def sync(path: str | Path) -> None:
    """Sync the content of a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(folder: str | Path) -> None:
    """``sync`` for a folder and everything below it, written by code that does not do so itself."""
    for inside in sorted(Path(folder).rglob("*")):
        sync(inside)
    sync(folder)


def read_json(path: str | Path, unique: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        unique: whether to refuse a key with two different values in one object.

    Raises:
        ValueError: the file does not exist, or does not hold an object.
    """
    path = Path(path)

    def join(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        for name, value in pairs if unique else ():
            if value != found[name]:
                raise ValueError(f"{name}: expected one value, got {value!r} and {found[name]!r}")
        return _special_float(found)

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=join)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected an existing file, got none") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected valid JSON, got too many levels of nesting") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected valid JSON, got {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _special_float(found: dict[str, Any]) -> Any:
    """Convert infinities, which transformers writes as {"__float__": "Infinity"} because JSON has
    none.
    """
    return float(found["__float__"]) if set(found) == {"__float__"} else found
