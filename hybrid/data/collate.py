"""Collate rows into a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrid.data.packing import Row


class RowCollator:
    """Collator that stacks rows; omits ``position_ids`` if no row of the batch has a document
    boundary.

    A model builds the mask of a packed batch from ``position_ids`` that restart. Without a boundary
    they have no effect, and attention stays on its plain causal path.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Stack rows of (T,) into ``input_ids``, ``labels`` and, if needed, ``position_ids``, each
        (B, T).
        """
        batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        positions = batch["position_ids"]
        if torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
            del batch["position_ids"]
        return batch
