"""Text available on every machine: the source files of Python's standard library.

A file is held out for evaluation if the CRC-32 of its path is a multiple of ``HOLD_OUT``. All other
files are for training. The rule depends only on the path, so training and evaluation agree on it.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

# Third-party code, tests (mostly data), and folders that distributions leave out.
SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "turtledemo",
}
HOLD_OUT = 20

Split = Literal["train", "heldout"]


def stdlib_files(split: Split, root: Path | None = None) -> list[Path]:
    """Return the source files of one split, sorted by path.

    Args:
        split: "train", or "heldout" for about one file in twenty.
        root: the library's folder; None for that of the running interpreter.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = sorted(_python_files(root))
    return [p for p in files if held_out(p.relative_to(root)) == (split == "heldout")]


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]  # site-packages may be huge
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def held_out(path: Path) -> bool:
    """Return whether a file, relative to the library's folder, is held out for evaluation."""
    return zlib.crc32(path.as_posix().encode("utf-8")) % HOLD_OUT == 0


def stdlib_texts(split: Split) -> list[str]:
    """Return the text of every file of one split."""
    return [p.read_bytes().decode("utf-8", errors="replace") for p in stdlib_files(split)]
