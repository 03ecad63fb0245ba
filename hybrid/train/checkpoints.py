"""Checkpoints that can be trusted: whole or skipped.

A checkpoint is whole when its manifest, which is written last and put in place at once, lists every
file with the size and the CRC-32 that the file still has. The manifest also names what the run
was made of, so that a checkpoint is not continued by a run that would mean something else.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hybrid.options import ConfigError

MANIFEST = "manifest.json"
FORMAT = "hybrid-checkpoint-1"
BLOCK = 1 << 22  # bytes read at a time


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """Mark a checkpoint as whole. `run` is what `refuse_other_run` compares later."""
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"format": FORMAT, "files": files, "run": dict(run)}, indent=1)
    unfinished = folder / f"{MANIFEST}.unfinished"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / MANIFEST)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written to the end"
    except ValueError:
        return f"its {MANIFEST} cannot be read"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"its {MANIFEST} is of another format"
    for name, (size, expected) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if checksum(path) != expected:
            return f"{name} has changed since it was written"
    return None


def numbered(output_dir: Path) -> list[Path]:
    """Checkpoint folders, whole or not, newest first."""
    if not output_dir.is_dir():
        return []
    steps = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output_dir.iterdir()}
    found = [(int(match[1]), path) for path, match in steps.items() if match]
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; each one that is skipped is reported in one line."""
    for folder in numbered(output_dir):
        problem = damage(folder)
        if problem is None:
            return folder
        report(f"skipping {folder}: {problem}")
    return None


def refuse_other_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Compare what a checkpoint's run was made of with the present one.

    Raises:
        ConfigError: they differ; one line for each key.
    """
    before = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"]
    present = json.loads(json.dumps(dict(run)))
    changed = [k for k in sorted({*before, *present}) if before.get(k) != present.get(k)]
    if changed:
        lines = [f"{k}: was {before.get(k)!r}, is {present.get(k)!r}" for k in changed]
        title = (
            f"{folder} belongs to a different run, and this one cannot continue it (put the keys"
            " back, remove the folder, or set another training.output_dir); it"
        )
        raise ConfigError(lines, title)
