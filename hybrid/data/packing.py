"""Pack documents of any length into rows of one fixed length.

A row is a list of spans. A span is a part of one document. In a row, ``position_ids`` restart at 0
at each span, which marks the document boundary for the model (there is no attention mask). The
first token of a span has no label, because the token before it belongs to another document. So the
loss of packed rows equals the loss of the separate spans.

    concatenate   concatenated documents, split wherever a row is full; every row but the last is
    full
    best_fit      spans that fit in a row are not split: best-fit decreasing (arXiv 2404.10830,
    section 3)
    none          one span per row

The rest of a row is a span of padding without labels.
Legend: T tokens of a row, R rows, N documents.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybrid.data.documents import Documents

IGNORE = -100  # the label that transformers' losses ignore

Packing = Literal["concatenate", "best_fit", "none"]
LongDocuments = Literal["split", "truncate", "refuse"]
Row = dict[str, np.ndarray]


def row_from_spans(spans: list[np.ndarray], length: int, pad_id: int) -> Row:
    """Return one row: ``input_ids``, ``labels``, ``position_ids``, each (T,) int64."""
    row = {
        "input_ids": np.full(length, pad_id, np.int64),
        "labels": np.full(length, IGNORE, np.int64),
        "position_ids": np.zeros(length, np.int64),
    }
    start = 0
    for span in spans:
        stop = start + len(span)
        row["input_ids"][start:stop] = span
        row["labels"][start + 1 : stop] = span[1:]
        row["position_ids"][start:stop] = np.arange(len(span))
        start = stop
    row["position_ids"][start:] = np.arange(length - start)
    return row


@dataclass(frozen=True)
class PackedRows:
    """The rows of one ``Documents``: ``rows[i]`` for 0 <= i < len(rows), in the order of the
    documents.

    Attributes:
        documents: the tokens.
        length: T.
        pad_id: id of padding.
        spans: (S, 2) int64, begin and end of each span in ``documents.tokens``.
        bounds: (R + 1,) int64, row r has spans ``bounds[r]:bounds[r + 1]``.
    """

    documents: Documents
    length: int
    pad_id: int
    spans: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Row:
        first, last = self.bounds[index], self.bounds[index + 1]
        tokens = self.documents.tokens
        pieces = [tokens[begin:end] for begin, end in self.spans[first:last]]
        return row_from_spans(pieces, self.length, self.pad_id)


def pack(
    documents: Documents,
    length: int,
    pad_id: int,
    packing: Packing = "concatenate",
    long_documents: LongDocuments = "split",
) -> PackedRows:
    """Pack documents into rows of ``length`` tokens.

    Args:
        documents: N documents.
        length: T, tokens of a row.
        pad_id: id of padding.
        packing: see the head of this file.
        long_documents: treatment of documents longer than a row: split into several spans,
            truncated at T tokens, or refused.

    Raises:
        ValueError: a document is longer than a row and ``long_documents`` is "refuse".
    """
    spans = _limit(documents, length, long_documents)
    if packing == "concatenate":
        spans, bounds = _concatenate(spans, length)
        return PackedRows(documents, length, pad_id, spans, bounds)
    spans = _split(spans, length)
    bounds = np.arange(len(spans) + 1, dtype=np.int64)
    if packing == "best_fit":
        order, bounds = _best_fit(spans[:, 1] - spans[:, 0], length)
        spans = spans[order]
    return PackedRows(documents, length, pad_id, spans, bounds)


def _limit(documents: Documents, length: int, policy: LongDocuments) -> np.ndarray:
    """Return (N, 2): documents as spans, with ``policy`` applied to those longer than a row."""
    begin, end = documents.offsets[:-1], documents.offsets[1:]
    long = np.flatnonzero(documents.lengths > length)
    if policy == "refuse" and len(long):
        raise ValueError(
            f"long_documents: expected no document above sequence_length {length} with 'refuse', got"
            f" {len(long)} of {len(documents)} (document {long[0]} has"
            f" {documents.lengths[long[0]]} tokens); try 'split' or 'truncate', or a larger"
            " sequence_length"
        )
    if policy == "truncate":
        end = np.minimum(end, begin + length)
    return np.stack([begin, end], axis=1)


def _split(spans: np.ndarray, length: int) -> np.ndarray:
    """Return (S, 2): the same tokens in spans of at most ``length``."""
    begin, end = spans[:, 0], spans[:, 1]
    pieces = -(-(end - begin) // length)
    ordinal = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(begin, pieces) + ordinal * length
    return np.stack([starts, np.minimum(starts + length, np.repeat(end, pieces))], axis=1)


def _concatenate(spans: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return spans split at every ``length``-th token of their concatenation, and the bounds of the
    rows.
    """
    sizes = spans[:, 1] - spans[:, 0]
    stops = np.cumsum(sizes)
    total = int(stops[-1]) if len(stops) else 0
    cuts = np.union1d(stops, np.arange(length, total, length))
    starts = np.concatenate([[0], cuts])[:-1].astype(np.int64)
    source = np.searchsorted(stops, starts, side="right")
    shift = spans[source, 0] - (stops - sizes)[source]
    pieces = np.stack([starts + shift, cuts + shift], axis=1).astype(np.int64)
    edges = np.arange(-(-total // length) + 1) * length
    return pieces, np.searchsorted(starts, edges).astype(np.int64)


def _best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of spans and the bounds of rows: longest first, each in the fullest row it
    fits.
    """
    room: list[int] = []  # free tokens of the open rows, ascending
    owner: list[int] = []  # the row that each entry of ``room`` belongs to
    rows: list[list[int]] = []
    for span in np.argsort(-sizes, kind="stable"):
        size = int(sizes[span])
        place = bisect.bisect_left(room, size)
        if place == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(place), owner.pop(place)
        rows[row].append(int(span))
        if left > size:
            at = bisect.bisect_left(room, left - size)
            room.insert(at, left - size)
            owner.insert(at, row)
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.asarray([span for row in rows for span in row], np.int64), bounds
