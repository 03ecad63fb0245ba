"""Write and verify checkpoints: each is complete, or is skipped.

A checkpoint is complete if its manifest matches its files. The manifest is written last and
atomically. It lists every file with its size and CRC-32, and has a CRC-32 of its own. It also
records the configuration of the run, so that another run does not resume from the checkpoint by
mistake.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from hybrid.checkpoint_paths import MANIFEST
from hybrid.config.changes import changes
from hybrid.config.options import ConfigError, first_few
from hybrid.files import sync, sync_folder, write_json

FORMAT = "hybrid-checkpoint-2"
BLOCK = 1 << 22  # bytes read at a time


class CheckpointError(OSError):
    """A checkpoint, or the final model of a run, could not be written."""


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Convert errors of a full or missing disk to one error.

    Raises:
        CheckpointError: ``what`` could not be written.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and not _of_torch_save(error):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        if isinstance(error, RuntimeError):
            reason = f"the disk is full or nearly full: {reason}"
        raise CheckpointError(
            f"cannot write {what} ({reason}); earlier checkpoints are kept: free space and run the"
            " same command again"
        ) from error


def _of_torch_save(error: RuntimeError) -> bool:
    """Return whether an error is of torch's zip writer, which raises RuntimeError on a full disk."""
    return any(part in str(error) for part in ("PytorchStreamWriter", "inline_container"))


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint, after its files are on disk.

    ``run`` is compared by ``refuse_other_run`` on resume.
    """
    inside = sorted(path for path in folder.rglob("*") if path.name != MANIFEST)
    sync_folder(folder)
    sync(folder.parent)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)]
        for path in inside
        if path.is_file()
    }
    # converted through JSON, which turns numeric keys into text and changes their order
    content = json.loads(json.dumps({"format": FORMAT, "files": files, "run": dict(run)}))
    # synced before an older checkpoint is removed
    write_json(folder / MANIFEST, {**content, "checksum": _checksum_of(content)})


def _checksum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode("utf-8"))


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def damage(folder: Path, contents: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is complete.

    Args:
        folder: the checkpoint.
        contents: if False, compare only the sizes of its files, which is fast.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it is incomplete"
    except ValueError:
        return f"{MANIFEST}: expected valid JSON"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"{MANIFEST}: expected format {FORMAT!r}, got another"
    if manifest.pop("checksum", None) != _checksum_of(manifest):
        return f"{MANIFEST}: expected the recorded checksum, got another"
    for name, (size, expected) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name}: expected in the checkpoint, got none"
        if path.stat().st_size != size:
            return f"{name}: expected {size} bytes, got {path.stat().st_size}"
        if contents and checksum(path) != expected:
            return f"{name}: expected the recorded checksum, got another"
    return None


def numbered(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, complete or not, newest first."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the optimizer step of a checkpoint."""
    return int(folder.name.rpartition("-")[2])


def remove_old(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep ``newest``, the ``limit - 1`` complete checkpoints before it, and the best.

    Remove older ones.

    Incomplete checkpoints, and checkpoints of later steps than ``newest``, do not count.
    transformers' own rotation would count them, and would remove complete checkpoints instead.
    """
    if limit is None:
        return
    older = [p for p in numbered(newest.parent) if step_of(p) < step_of(newest)]
    kept = [p for p in older if damage(p, contents=False) is None][: limit - 1]
    for folder in older:
        if folder not in kept and folder.name != Path(best or "").name:
            shutil.rmtree(folder, ignore_errors=True)


def newest_whole(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint; report each skipped one in one line."""
    for folder in numbered(output_dir):
        problem = damage(folder)
        if problem is None:
            return folder
        report(f"skipping {folder}: {problem}")
    return None


def refuse_other_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Compare the configuration recorded in a checkpoint with that of the current run.

    Raises:
        ConfigError: they differ; one line for each key.
    """
    before = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"]
    present = json.loads(json.dumps(dict(run)))
    changed = [k for k in sorted({*before, *present}) if before.get(k) != present.get(k)]
    # fingerprints of a source (``data[0] ...``): None means unknown, e.g. without network access
    known = [k for k in changed if before.get(k) is not None and present.get(k) is not None]
    # the fingerprint depends on the keys: do not report it again if those differ
    keys = [k for k in changed if not k.startswith("data[")]
    changed = keys or known
    if changed:
        refuse_changes(
            {k: before.get(k) for k in changed},
            {k: present.get(k) for k in changed},
            f"{folder} belongs to a different run, and this one cannot continue it (put the keys"
            " back, remove the folder, or set another training.output_dir); it",
        )


def refuse_changes(before: Mapping[str, Any], present: Mapping[str, Any], title: str) -> None:
    """Refuse to continue a run with another configuration.

    Args:
        before: configuration of the files on disk.
        present: configuration of the current run.
        title: first line of the error: the files, and what to do.

    Raises:
        ConfigError: they differ; one line for each key, with both values.
    """
    lines = changes(before, present)
    if lines:
        raise ConfigError(first_few(lines, 20), title)
