"""Lock an output folder for one writer at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, OWNER = ".lock", ".lock.json"


class FolderInUse(ValueError):
    """Another process writes to the folder."""


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Lock ``folder`` against other processes that call this function; create it if missing.

    The operating system releases the lock when its process ends, so a lock file of a dead process
    is not an obstacle.

    Raises:
        FolderInUse: another process has the lock; the message names it.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(
            f"{folder} is in use by another run ({_owner(folder)}); wait for it, stop it, or name"
            " another folder"
        ) from error
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        with suppress(OSError):  # a full disk is for what is worth keeping to report
            (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()
        if new and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
            (folder / LOCK).unlink()
            folder.rmdir()


def _owner(folder: Path) -> str:
    """Who holds the lock, in words; it may be about to write that down, or to end."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just begun"
