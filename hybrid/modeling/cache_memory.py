"""Contents of one cache slot: the tokens and states of a mixer, and a recording of the past.

Speculative decoding removes tokens (``Cache.crop``). Columns of tokens can be dropped, but a recurrent
state cannot be reversed. While transformers asks its layers to record the past, a slot with states
therefore saves the states at a mark and the inputs of its mixer since the mark. After a crop, the mixer
runs again on the remaining inputs (``CacheSlot.begin``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Recording:
    """Data to roll the states of one slot back to any token since a mark."""

    states: dict[str, torch.Tensor]
    """States at the mark."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """Inputs of the mixer since the mark, (B, t, D) each."""
    real: list[torch.Tensor] = field(default_factory=list)
    """Bool masks of the inputs that are not padding, (t,) each."""
    removed: int = 0
    """Number of inputs removed by ``crop``."""
    settled: bool = False
    """Whether ``crop`` was called since the last input. The next forward then sets a new mark."""

    @property
    def length(self) -> int:
        """Number of remaining tokens since the mark, including padding."""
        return sum(x.shape[1] for x in self.inputs) - self.removed

    def kept(self) -> torch.Tensor:
        """Return the remaining inputs without padding, (B, t, D)."""
        left = self.length
        return torch.cat(self.inputs, dim=1)[:, :left][:, torch.cat(self.real)[:left]]


@dataclass
class Columns:
    """Cached tokens of one name in one slot, (B, heads, S, dim); S grows up to the window."""

    window: int | None
    tensor: torch.Tensor | None = None
    total: int = 0
    """Number of tokens since the start."""

    def append(
        self, new: torch.Tensor, lengths: torch.Tensor | None, *, recording: bool
    ) -> torch.Tensor:
        """See ``Slot.append``. While recording, columns outside the window are kept."""
        past, time = self.tensor, new.shape[2]
        both = new if past is None else torch.cat([past.to(new.dtype), new], dim=2)
        self.total += time
        self.tensor = both
        if self.window is None:
            return both
        kept = both.shape[2] if recording else min(both.shape[2], self.window - 1)
        if kept < both.shape[2] or lengths is not None:
            self.tensor = last_columns(both, time, lengths, kept)
        return both[:, :, max(0, both.shape[2] - time - self.window + 1) :]

    @property
    def spare(self) -> int:
        """Number of tokens that can be removed while the window of the next token stays complete."""
        held = 0 if self.tensor is None else self.tensor.shape[2]
        if self.window is None or held == self.total:
            return held
        return held - (self.window - 1)

    def crop(self, tokens: int) -> None:
        """Drop the last ``tokens`` columns."""
        if self.tensor is not None and tokens:
            self.tensor = self.tensor[:, :, : self.tensor.shape[2] - tokens]
            self.total -= tokens


@dataclass
class SlotMemory:
    """Contents of one slot."""

    tokens: dict[str, Columns] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    recording: Recording | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors except recordings."""
        columns = (c.tensor for c in self.tokens.values())
        return [x for x in columns if x is not None] + list(self.states.values())

    def map(self, function: Map) -> None:
        """Replace every tensor by the function of it."""
        for columns in self.tokens.values():
            if columns.tensor is not None:
                columns.tensor = function(columns.tensor)
        self.states = {name: function(state) for name, state in self.states.items()}
        if self.recording is not None:
            states = self.recording.states
            self.recording.states = {name: function(state) for name, state in states.items()}
            self.recording.inputs = [function(x) for x in self.recording.inputs]


def last_columns(
    x: torch.Tensor, time: int, lengths: torch.Tensor | None, kept: int
) -> torch.Tensor:
    """Return the last columns with tokens, (B, heads, kept, dim), of x (B, heads, S, dim).

    Args:
        x: earlier columns, followed by ``time`` new ones.
        time: number of new columns.
        lengths: (B,), number of new columns with tokens; None for all.
        kept: number of columns to return. If a row has fewer tokens, its first columns are undefined.
    """
    past = x.shape[2] - time
    if lengths is None:
        last = x[:, :, x.shape[2] - kept :]
        # a view would keep the memory of the whole prefill
        return last.clone() if x.shape[2] > 2 * kept else last
    place = (lengths + past - kept)[:, None] + torch.arange(kept, device=x.device)
    place = place.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, place)
