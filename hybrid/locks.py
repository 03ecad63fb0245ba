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
            f"{folder}: expected a folder without a running process, got one in use by"
            f" {_owner(folder)}; wait for it, stop it, or try another folder"
        ) from error
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": started}
        with suppress(OSError):  # a full disk is reported when results are written
            (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()
        if new and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was written
            (folder / LOCK).unlink()
            folder.rmdir()


def _owner(folder: Path) -> str:
    """Return a description of the process with the lock, which may not have written it yet."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just started"
