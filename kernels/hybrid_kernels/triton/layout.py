"""Where chunks lie: plain batches by arithmetic, packed documents by tables made on the device.

No table needs the host to wait for the device: the number of chunks is bounded by
T // C + N, the surplus chunks have no rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_kernels.packing import documents


@dataclass(frozen=True)
class Chunks:
    """The chunks of a batch or of one row of packed documents.

    Attributes:
        sequences: number of states.
        count: number of chunks, surplus ones included.
        time: T.
        per_row: chunks of one row of a plain batch.
        offsets: (N+1,) int64 first row of each document, or a dummy.
        first: (N+1,) int64 first chunk of each document, or a dummy.
        owner: (count,) int64 document of each chunk, or a dummy.
        packed: whether the tables are in use.
    """

    sequences: int
    count: int
    time: int
    per_row: int
    offsets: Tensor
    first: Tensor
    owner: Tensor
    packed: bool

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tables, in the order in which kernels take them."""
        return self.offsets, self.first, self.owner


def counts(x: Tensor, cu_seqlens: Tensor | None, size: int) -> tuple[int, int]:
    """Return how many sequences (B, T, ...) holds, and a bound on their chunks, met if plain."""
    batch, time = x.shape[:2]
    if cu_seqlens is None:
        return batch, batch * -(-time // size)
    documents = cu_seqlens.shape[0] - 1
    return documents, time // size + documents


def chunks(x: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Cut (B, T, ...) into chunks of ``size`` rows, none of which crosses a document boundary.

    Raises:
        ValueError: ``cu_seqlens`` lie on the CPU and are not offsets that rise from 0 to T. On a
            GPU the same is checked by an assertion on the device, which does not wait.
    """
    time = x.shape[1]
    per_row = -(-time // size)
    documents, count = counts(x, cu_seqlens, size)
    if cu_seqlens is None:
        return Chunks(documents, count, time, per_row, x, x, x, packed=False)
    _check(cu_seqlens, time)
    offsets = cu_seqlens.to(device=x.device, dtype=torch.int64)
    first = torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + size - 1) // size, dim=0, out=first[1:])
    index = torch.arange(count, device=x.device)
    owner = torch.searchsorted(first[1:], index, right=True).clamp_(max=documents - 1)
    return Chunks(documents, count, time, per_row, offsets, first, owner, packed=True)


def _check(cu_seqlens: Tensor, time: int) -> None:
    if cu_seqlens.device.type == "cpu":
        documents(cu_seqlens, time)
        return
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == time) & (cu_seqlens.diff() >= 0).all()
    words = f"cu_seqlens: expected ascending offsets from 0 to T = {time}"
    torch._assert_async(good, words)  # pyright: ignore[reportPrivateImportUsage]
