"""Padding and packed sequences for mixers with a state: one mechanism for both.

A recurrence must not read padding and must not cross document boundaries. One representation covers
both: the real tokens of a batch are a list of documents in a batch of one, with boundaries
``cu_seqlens``. A padded batch has one document per row, without its padding (left, right or in between).
In a packed batch, documents start where position ids restart, or where another argument marks them
(``name_documents``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Segments:
    """Document boundaries and padding of a batch, in the format of the linear ops.

    Attributes:
        cu_seqlens: (N + 1,) int32, boundaries of the N documents in the packed order; None if every row
            is one whole document.
        index: (tokens,) int64, indices of the real tokens in the flattened batch (B * T); None without
            padding.
        places: (B, T), position of each token in its document, 0 at padding; None if no row holds
            several documents.
    """

    cu_seqlens: torch.Tensor | None = None
    index: torch.Tensor | None = None
    places: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether any row holds several documents."""
        return self.places is not None

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Pack (B, T, ...) to (1, tokens, ...); unchanged if every row is one whole document."""
        if self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat[self.index]).unsqueeze(0)

    def unpack(self, y: torch.Tensor, batch: int, time: int) -> torch.Tensor:
        """Invert ``pack``: (1, tokens, D) to (B, T, D), with zeros at padding."""
        if self.cu_seqlens is None:
            return y
        if self.index is None:
            return y.view(batch, time, *y.shape[2:])
        out = y.new_zeros(batch * time, *y.shape[2:])
        return out.index_copy(0, self.index, y[0]).view(batch, time, *y.shape[2:])


WHOLE_ROWS = Segments()


def find_segments(
    mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, time: int
) -> Segments:
    """Return the document boundaries and padding of a batch.

    Args:
        mask: (B, T_total) with 0 at padding, as returned by a tokenizer. Only the last ``time`` columns,
            those of the current forward, are used. None for no padding.
        position_ids: (1 or B, T). A document starts where a position does not follow that of the
            previous real token. None for one document per row.
        batch, time: B and T of the current forward.
    """
    real = None if mask is None else mask[:, -time:].bool()
    starts = None
    if position_ids is not None:
        starts = _restarts(position_ids.expand(batch, -1), real)
    padded, several = _any(None if real is None else ~real, starts)
    real, starts = real if padded else None, starts if several else None
    if starts is None:
        if real is None:
            return WHOLE_ROWS
        lengths = real.sum(dim=1)
        return Segments(_boundaries(lengths), real.flatten().nonzero().squeeze(1))
    starts[:, 0] = True
    if real is None:
        begin = starts.flatten().nonzero().squeeze(1)
        end = begin.new_tensor([starts.numel()])
        return Segments(torch.cat([begin, end]).to(torch.int32), None, _places(starts, real))
    first = real & (real.cumsum(dim=1) == 1)
    starts = (starts | first) & real
    index = real.flatten().nonzero().squeeze(1)
    begin = starts.flatten()[index].nonzero().squeeze(1)
    boundaries = torch.cat([begin, begin.new_tensor([len(index)])]).to(torch.int32)
    return Segments(boundaries, index, _places(starts, real))


def _any(*flags: torch.Tensor | None) -> list[bool]:
    """Return whether any element of each tensor is True, with one synchronisation of the device."""
    code = sum(2**i * flag.any() for i, flag in enumerate(flags) if flag is not None)
    code = int(code)
    return [bool(code >> i & 1) for i in range(len(flags))]


def from_positions(position_ids: torch.Tensor, batch: int) -> Segments:
    """Return the segments of packed documents without padding, from position ids (1 or B, T)."""
    return find_segments(None, position_ids, batch, position_ids.shape[1])


def _restarts(position_ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Mark (B, T) real tokens whose position does not follow the previous one, except in column 0."""
    gap = torch.ones_like(position_ids)
    gap[:, 1:] = position_ids.diff(dim=1)
    starts = gap != 1
    if real is None:
        return starts
    column = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(real)
    last_real = torch.where(real, column, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    gap = position_ids - position_ids.gather(1, before.clamp(min=0))
    return starts & (gap != 1) & real & (before >= 0)


def _places(starts: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    column = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    if real is not None:
        column = real.cumsum(dim=1) - 1
    places = column - torch.where(starts, column, 0).cummax(dim=1).values
    return places if real is None else torch.where(real, places, 0)


def name_documents(
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    kwargs: Mapping[str, Any],
    shape: tuple[int, int],
) -> tuple[Any, torch.Tensor | None]:
    """Convert every format of packed documents to position ids that restart, and a 0/1 mask.

    Documents are marked by ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (flash attention), ``seq_idx``
    (Mamba's kernels), an attention mask of document numbers 1, 2, ..., or position ids.

    Args:
        attention_mask: (B, T_total). Any other value is returned unchanged.
        position_ids: (1 or B, T), or None.
        kwargs: keyword arguments of the forward.
        shape: B and T.

    Returns:
        The 0/1 attention mask and the position ids.

    Raises:
        ValueError: two arguments mark different documents, or one does not fit the batch.
    """
    batch, time = shape
    named: dict[str, torch.Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if kwargs.get(name) is not None:
            check_integers(name, kwargs[name])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            named[name] = _numbers_of_boundaries(name, kwargs[name], batch, time)
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is not None:
        if seq_idx.ndim != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != time:
            raise ValueError(
                f"seq_idx: expected document numbers of shape ({batch}, {time}), got"
                f" {tuple(seq_idx.shape)}"
            )
        named["seq_idx"] = seq_idx.expand(batch, -1)
    real = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        numbers = attention_mask[:, -time:]
        several = False
        if attention_mask.dtype != torch.bool and time > 1:
            # one synchronisation of the device
            odd = (attention_mask > 1) | (attention_mask < 0)
            several = bool(odd.any())
            if several and bool((attention_mask < 0).any()):
                raise ValueError(
                    "attention_mask: expected 0 at padding and 1 or document numbers at tokens, got a"
                    " negative number"
                )
        if several:
            named["attention_mask (document numbers)"] = numbers
            attention_mask = (attention_mask > 0).to(attention_mask.dtype)
        if named:
            real = numbers > 0
            real = None if bool(real.all()) else real
    if not named:
        return attention_mask, position_ids
    changes = {name: _changes(numbers, real) for name, numbers in named.items()}
    if position_ids is not None:
        changes["position_ids"] = _restarts(position_ids.expand(batch, -1), real)
    (first, boundaries), *others = changes.items()
    for name, other in others:
        if not torch.equal(other, boundaries):
            raise ValueError(
                f"{name}: expected the same documents as {first}, got different documents; try only one"
                " of them"
            )
    if position_ids is None:
        starts = boundaries.clone()
        if real is not None:
            starts |= real & (real.cumsum(dim=1) == 1)
        else:
            starts[:, 0] = True
        position_ids = _places(starts, real)
    return attention_mask, position_ids


def _changes(numbers: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Mark (B, T) where document numbers change from one real token to the next."""
    column = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    if real is None:
        before = column - 1
    else:
        last_real = torch.where(real, column, -1).cummax(dim=1).values
        before = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    changed = (numbers != numbers.gather(1, before.clamp(min=0))) & (before >= 0)
    return changed if real is None else changed & real


def _numbers_of_boundaries(
    name: str, cu_seqlens: torch.Tensor, batch: int, time: int
) -> torch.Tensor:
    """Return document numbers (B, T) for boundaries (N + 1,) in the flattened batch.

    Empty documents are dropped.
    """
    bounds = cu_seqlens.long()
    total = batch * time
    if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != total:
        raise ValueError(
            f"{name}: expected boundaries from 0 to the {total} tokens of the batch, got"
            f" {bounds.tolist()}"
        )
    if bool((bounds.diff() < 0).any()):
        raise ValueError(f"{name}: expected ascending boundaries, got {bounds.tolist()}")
    rows = time * torch.arange(batch, device=bounds.device)
    if not bool(torch.isin(rows, bounds).all()):
        raise ValueError(
            f"{name}: expected a boundary at the start of each of the {batch} rows of {time} tokens,"
            f" got {bounds.tolist()}"
        )
    token = torch.arange(total, device=bounds.device)
    return torch.searchsorted(bounds, token, right=True).view(batch, time)


def check_mask(mask: Any, batch: int, time: int, past: int | torch.Tensor | None) -> None:
    """Raise an error for an attention mask that does not fit the tokens.

    Args:
        mask: (B, T_past + T), 1 or document numbers at real tokens and 0 at padding; or a 4-dimensional
            mask for attention functions. A ``BlockMask`` is not checked.
        batch, time: B and T of the current forward.
        past: T_past; None if unknown.

    Raises:
        ValueError: wrong type, shape or values.
    """
    if mask is None or type(mask).__name__ == "BlockMask":
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask: expected a tensor, got {type(mask).__name__}")
    if mask.ndim == 4:
        if mask.shape[0] not in (1, batch) or mask.shape[2] != time or mask.shape[3] < time:
            raise ValueError(
                f"attention_mask: expected ({batch} or 1, heads or 1, {time}, at least {time}), got"
                f" {tuple(mask.shape)}"
            )
        return
    if torch.compiler.is_compiling() or (isinstance(past, torch.Tensor) and past.is_cuda):
        past = None  # reading it would synchronise the device
    width = None if past is None else int(past) + time
    fits = mask.ndim == 2 and mask.shape[0] == batch
    if not fits or mask.shape[1] < time or width not in (None, mask.shape[1]):
        known = f"{time}" if not past else f"{int(past)} + {time}"
        raise ValueError(
            f"attention_mask: expected a column for each token of the cache and of the input,"
            f" ({batch}, {known}), got {tuple(mask.shape)}; try 1 at tokens and 0 at padding, and"
            " position_ids that restart for documents"
        )
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "attention_mask: expected 1 at tokens and 0 at padding, got a floating-point mask with"
            " other values; try 4 dimensions for a mask that is added to the logits"
        )


def check_integers(name: str, value: Any) -> None:
    """Raise an error for a value that is not a tensor of integers.

    Raises:
        ValueError: the value is not a tensor of integers.
    """
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if not isinstance(value, torch.Tensor) or value.dtype not in kinds:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor of integers, got {got}")


def check_positions(position_ids: torch.Tensor | None, batch: int, time: int) -> None:
    """Raise ValueError for position ids that are not (1 or B, T) integers."""
    if position_ids is None:
        return
    check_integers("position_ids", position_ids)
    shape = tuple(position_ids.shape)
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] != time:
        raise ValueError(
            f"position_ids: expected ({batch} or 1, {time}), got {shape}; try"
            " torch.arange(T)[None], or none"
        )


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    zero = lengths.new_zeros(1)
    return torch.cat([zero, lengths.cumsum(0)]).to(torch.int32)
