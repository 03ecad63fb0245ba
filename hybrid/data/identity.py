"""Fingerprints of sources, to detect on resume that a source has other data under the same name.

Data read at the start has a checksum of all its content. Streamed data has checksums of its files
(or its revision on the hub) and of a sample of its rows.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hybrid.data.packing import Row

FIRST_ROWS = 32
"""Number of first rows of a source that are compared."""

LAST_POWER = 16
"""For indexed sources, rows 64, 128, ... up to 2 ** LAST_POWER are also compared."""

WHOLE_BYTES = 1 << 30
"""Files of a source up to this total size are read whole."""

BLOCK_BYTES = 1 << 16
"""Of larger files, blocks of this size are read, evenly spaced in each file, WHOLE_BYTES in total."""


def first_rows() -> list[int]:
    """Return the indices of compared rows in a source that is read sequentially."""
    return list(range(FIRST_ROWS))


def spread_rows() -> list[int]:
    """Return the indices of compared rows in an indexed source.

    Independent of the length of the run.
    """
    return first_rows() + [2**power for power in range(6, LAST_POWER + 1)]


def rows_checksum(row: Callable[[int], Row], indices: Sequence[int]) -> int:
    """Return the CRC-32 of ids, labels and positions of rows, up to the end of the source.

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
    """Return the CRC-32 of the names, sizes and contents of files.

    See ``WHOLE_BYTES`` for large ones.
    """
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
    """Yield the starts of a file's blocks: all, or as many as fit in ``share`` bytes, at least 2."""
    blocks = -(-size // BLOCK_BYTES)
    wanted = blocks if share is None else min(blocks, max(2, share // BLOCK_BYTES))
    for number in range(wanted):
        block = number if wanted == blocks else number * (blocks - 1) // (wanted - 1)
        yield block * BLOCK_BYTES


def hub_revision(name: str) -> str | None:
    """Return the commit of a data set of the hub, or None if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(name).sha
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
