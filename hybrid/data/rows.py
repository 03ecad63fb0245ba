"""Rows by index, for all kinds of sources.

A ``Rows`` returns the same ``row(i)``, i >= 0, in every process and every run. A finite source has
``per_epoch`` rows and then starts again in another order. An endless one has ``per_epoch`` None.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any, Protocol

import numpy as np

from hybrid.data.documents import Documents
from hybrid.data.identity import first_rows, rows_checksum, spread_rows
from hybrid.data.packing import (
    IGNORE,
    LongDocuments,
    PackedRows,
    Packing,
    Row,
    pack,
    row_from_spans,
)

WINDOW = 1024  # documents of a stream among which best-fit packing selects


class Rows(Protocol):
    """The interface of a source for a mixture."""

    per_epoch: int | None

    def row(self, index: int) -> Row:
        """Return row ``index``: ``input_ids``, ``labels``, ``position_ids``, each (T,) int64."""
        ...

    def identity(self) -> dict[str, int | str | None]:
        """Return fingerprints of the data by name; None means unknown and is not compared."""
        ...


class ShuffledRows:
    """Packed rows of finite data, shuffled in each epoch.

    Args:
        parts: packed rows, e.g. one for each shard.
        seed: seed of the order.
    """

    def __init__(self, parts: Sequence[PackedRows], seed: int) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(p) for p in parts))
        self.per_epoch: int | None = self.ends[-1] if self.ends else 0
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    def row(self, index: int) -> Row:
        """See ``Rows.row``."""
        assert self.per_epoch
        epoch, place = divmod(index, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._order = epoch, generator.permutation(self.per_epoch)
        place = int(self._order[1][place])
        part = bisect.bisect_right(self.ends, place)
        return self.parts[part][place - (self.ends[part - 1] if part else 0)]

    def identity(self) -> dict[str, int | str | None]:
        """See ``Rows.identity``; covers all documents."""
        values = [part.documents.checksum() for part in self.parts]
        return {"CRC-32 of its content": zlib.crc32(np.asarray(values, np.uint32).tobytes())}


class StreamedRows:
    """Rows of a source that can only be read sequentially.

    A later row continues reading. An earlier row, or the first row of a resumed run, restarts from
    the beginning and discards rows: exact, but as slow as reading.

    Args:
        start: creates an endless iterator from the beginning; the same one each time.
        origin: returns fingerprints in addition to those of the rows, for ``identity``.
    """

    per_epoch: int | None = None

    def __init__(
        self,
        start: Callable[[], Iterator[Row]],
        origin: Callable[[], dict[str, int | str | None]] = dict,
    ) -> None:
        self._start, self._origin = start, origin
        self._rows: Iterator[Row] = iter(())
        self._last: tuple[int, Row] | None = None

    def row(self, index: int) -> Row:
        """See ``Rows.row``."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        last = self._last
        self._last = None  # an iterator that raised is exhausted: the next call restarts
        with _unsplit():
            if last is None or last[0] > index:
                self._rows, last = self._start(), None
            for reached in range(0 if last is None else last[0] + 1, index + 1):
                row = next(self._rows, None)
                if row is None:
                    raise ValueError(f"expected a source without an end, got {reached} rows")
                last = reached, row
        assert last is not None
        self._last = last
        return last[1]

    def identity(self) -> dict[str, int | str | None]:
        """See ``Rows.identity``; covers the first rows, and their files or revision."""
        rows = first_rows()
        return {f"CRC-32 of its first {len(rows)} rows": rows_checksum(self.row, rows)} | (
            self._origin()
        )


@contextmanager
def _unsplit() -> Iterator[None]:
    """Hide from readers that this process is a worker of a ``DataLoader``.

    Streams of ``datasets`` and many iterable data sets of torch yield only a worker's share of
    their rows. Here the sampler distributes rows by index, and row i is the same in every process.
    """
    from torch.utils.data._utils import worker

    info = worker._worker_info
    worker._worker_info = None
    try:
        yield
    finally:
        worker._worker_info = info


class PluginRows:
    """Rows of a plug-in with random access (``source[i]``)."""

    per_epoch: int | None = None

    def __init__(self, source: Any, length: int, pad_id: int) -> None:
        self.source, self.length, self.pad_id = source, length, pad_id

    def row(self, index: int) -> Row:
        """See ``Rows.row``."""
        return complete(self.source[index], self.length, self.pad_id)

    def identity(self) -> dict[str, int | str | None]:
        """See ``Rows.identity``; covers a sample of rows."""
        rows = spread_rows()
        return {f"CRC-32 of {len(rows)} of its rows": rows_checksum(self.row, rows)}


def complete(row: Any, length: int, pad_id: int) -> Row:
    """Check a plug-in's row, add ``position_ids``, and pad it at the end to ``length``.

    Raises:
        ValueError: a key is missing, lengths differ, or the row is too long.
    """
    absent = {"input_ids", "labels"} - set(row)
    if absent:
        raise ValueError(f"row: expected a key {sorted(absent)[0]!r}, got keys {sorted(row)}")
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    if ids.ndim != 1 or ids.shape != labels.shape or not 1 <= len(ids) <= length:
        raise ValueError(
            f"row: expected input_ids and labels of one shape (T,) with 1 <= T <= sequence_length"
            f" {length}, got {ids.shape} and {labels.shape}"
        )
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"row.{name}: expected integers, got {values.dtype}")
    full = row_from_spans([ids], length, pad_id)
    full["labels"] = np.full(length, IGNORE, np.int64)
    full["labels"][: len(labels)] = labels
    if "position_ids" in row:
        positions = np.asarray(row["position_ids"])
        if positions.shape != ids.shape or positions.dtype.kind not in "iu":
            raise ValueError(
                f"row.position_ids: expected integers of shape {ids.shape}, got {positions.dtype} of"
                f" shape {positions.shape}"
            )
        full["position_ids"][: len(ids)] = positions
    return full


def packed_stream(
    documents: Iterable[np.ndarray],
    length: int,
    pad_id: int,
    packing: Packing = "concatenate",
    long_documents: LongDocuments = "split",
) -> Iterator[Row]:
    """Yield rows from a stream of token ids; the arguments are those of
    ``hybrid.data.packing.pack``.

    Concatenated rows are filled exactly. Best-fit packing selects among ``WINDOW`` documents at a
    time.
    """
    documents = _limited(documents, length, long_documents)
    if packing == "concatenate":
        yield from _concatenated(documents, length, pad_id)
        return
    documents = iter(documents)
    while window := list(islice(documents, WINDOW)):
        packed = pack(Documents.from_arrays(window), length, pad_id, packing)
        yield from (packed[i] for i in range(len(packed)))


def _limited(
    documents: Iterable[np.ndarray], length: int, policy: LongDocuments
) -> Iterator[np.ndarray]:
    for number, ids in enumerate(documents):
        if policy == "refuse" and len(ids) > length:
            raise ValueError(
                f"long_documents: expected no document above sequence_length {length} with 'refuse',"
                f" got document {number} of the stream with {len(ids)} tokens; try 'split' or"
                " 'truncate', or a larger sequence_length"
            )
        yield ids[:length] if policy == "truncate" else ids


def _concatenated(documents: Iterable[np.ndarray], length: int, pad_id: int) -> Iterator[Row]:
    spans: list[np.ndarray] = []
    free = length
    for ids in documents:
        while len(ids):
            spans.append(ids[:free])
            ids = ids[free:]
            free -= len(spans[-1])
            if not free:
                yield row_from_spans(spans, length, pad_id)
                spans, free = [], length
