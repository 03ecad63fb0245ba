"""What shows on resume that a source holds other data than before, under the same name.

Data that is held as a whole has a checksum of its whole. What is read as training goes is known by its
files (or, on the hub, by their revision) and by a sample of its rows.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hybrid.data.packing import Row

FIRST_ROWS = 32
"""Rows at the beginning of a source that are looked at."""

LAST_POWER = 16
"""Of a source that is indexed, rows 64, 128, ... up to 2 ** LAST_POWER are looked at, too."""

WHOLE_BYTES = 1 << 30
"""Files of a source that are together no larger are read whole."""

BLOCK_BYTES = 1 << 16
"""Of larger ones, blocks of this size spread evenly over each file, WHOLE_BYTES in all."""


def first_rows() -> list[int]:
    """Indices of rows that are looked at in a source that is only read forward."""
    return list(range(FIRST_ROWS))


def spread_rows() -> list[int]:
    """Indices of rows that are looked at in a source that is indexed; the same for any length of run."""
    return first_rows() + [2**power for power in range(6, LAST_POWER + 1)]


def rows_checksum(row: Callable[[int], Row], indices: Sequence[int]) -> int:
    """CRC-32 of ids, labels and positions of rows, up to where the source ends.

    Args:
        row: index -> row; raises IndexError, KeyError or ValueError at an index beyond the end.
        indices: ascending.
    """
    value = 0
    for index in indices:
        try:
            found = row(index)
        except (LookupError, ValueError):
            break
        for name in sorted(found):
            value = zlib.crc32(name.encode() + found[name].tobytes(), value)
    return value


def files_checksum(files: Sequence[str]) -> int:
    """CRC-32 of the names, sizes and contents of files; see `WHOLE_BYTES` for large ones."""
    sizes = [os.path.getsize(file) for file in files]
    share = None if sum(sizes) <= WHOLE_BYTES else WHOLE_BYTES // len(files)
    value = 0
    for file, size in zip(files, sizes, strict=True):
        value = zlib.crc32(f"{Path(file).name} {size}".encode(), value)
        with open(file, "rb") as content:
            for start in _block_starts(size, share):
                content.seek(start)
                value = zlib.crc32(content.read(BLOCK_BYTES), value)
    return value


def _block_starts(size: int, share: int | None) -> Iterator[int]:
    """Where the blocks of a file begin: all, or as many as fit into `share` bytes, 2 at least."""
    blocks = -(-size // BLOCK_BYTES)
    wanted = blocks if share is None else min(blocks, max(2, share // BLOCK_BYTES))
    for number in range(wanted):
        block = number if wanted == blocks else number * (blocks - 1) // (wanted - 1)
        yield block * BLOCK_BYTES


def hub_revision(name: str) -> str | None:
    """The commit of a data set of the hub, or None where the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(name).sha
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
