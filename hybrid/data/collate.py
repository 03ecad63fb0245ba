"""Rows become a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrid.data.packing import Row


class RowCollator:
    """Stacks rows; leaves `position_ids` out of a batch in which no row has a boundary.

    A model builds the mask of a packed batch out of `position_ids` that restart. Without a boundary
    they say nothing that the model would not assume, and attention stays on its plain causal path.
    """

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows of (T,) -> `input_ids`, `labels` and, where needed, `position_ids`, each (B, T)."""
        batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
        positions = batch["position_ids"]
        if torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
            del batch["position_ids"]
        return batch
