"""Rows split into slices, one for each process of a context-parallel group."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Dataset

from hybrid.data.mixture import Mixture
from hybrid.data.packing import IGNORE, Row


class SlicedRows(Dataset):
    """The slices of a mixture's rows, in the order in which accelerate distributes batches to
    processes.

    Batch n goes to process n modulo the number of processes. So each ``parts`` consecutive batches
    have the slices of the same ``batch`` rows, in order.

    Args:
        rows: whole rows of T tokens.
        parts: slices of a row, P; divides T.
        batch: rows of one process's batch, B; divides the number of rows.
    """

    def __init__(self, rows: Mixture | FilledRows, parts: int, batch: int) -> None:
        assert len(rows) % batch == 0
        self.rows, self.parts, self.batch = rows, parts, batch

    def __len__(self) -> int:
        return len(self.rows) * self.parts

    def __getitem__(self, index: int) -> Row:
        """Return ``input_ids``, ``labels``, ``position_ids`` and ``shift_labels``, (T / P,) each.

        ``shift_labels`` are the labels of the next token, which can be in the next slice.
        """
        number, place = divmod(index, self.batch)
        group, part = divmod(number, self.parts)
        row = self.rows[group * self.batch + place]
        ahead = np.append(row["labels"][1:], IGNORE).astype(row["labels"].dtype)
        size = len(row["labels"]) // self.parts
        cut = slice(part * size, (part + 1) * size)
        return {key: values[cut] for key, values in {**row, "shift_labels": ahead}.items()}


class FilledRows(Dataset):
    """A mixture's rows, followed by rows without labels up to a multiple of ``multiple``.

    So all processes have the same number of batches, and no row is used twice.
    """

    def __init__(self, rows: Mixture, multiple: int) -> None:
        self.rows, self.multiple = rows, multiple

    def __len__(self) -> int:
        return -(-len(self.rows) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Row:
        """See ``Mixture``."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected below {len(self)}, got {index}")
        return self.rows[index] if index < len(self.rows) else silent(self.rows[0])


def silent(row: Row) -> Row:
    """Return the row without its labels."""
    return {**row, "labels": np.full_like(row["labels"], IGNORE)}
