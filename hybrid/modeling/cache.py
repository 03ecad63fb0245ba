"""Slots of a transformers cache: how mixers read and write their tokens and states.

The cache layers are in ``hybrid.modeling.cache_layers``, and the contents of a slot in
``hybrid.modeling.cache_memory``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from hybrid.modeling.cache_layers import HybridCacheLayer, StaticHybridCacheLayer
from hybrid.modeling.cache_memory import Recording, SlotMemory
from hybrid.nn.packing import Segments
from hybrid.nn.past import Past

_SEVERAL_ROWS = (
    "attention_mask: expected one row, or no padding, while the cache records the past for speculative"
    " decoding, got a padded batch of several rows; try a batch of one row"
)


@dataclass(frozen=True)
class CacheSlot:
    """``hybrid.nn.past.Slot`` in a transformers cache."""

    cache: Cache
    layer_idx: int
    slot_idx: int = 0

    def append(
        self,
        *,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
        **tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """See ``Slot.append``."""
        layers = self.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if (
            window is None
            and list(tokens) == ["k", "v"]
            and not isinstance(layer, HybridCacheLayer)
        ):
            return self.cache.update(tokens["k"], tokens["v"], self.layer_idx)
        layer = self._layer()
        if lengths is not None and layer.record_past and len(lengths) > 1:
            raise ValueError(_SEVERAL_ROWS)
        return tuple(
            layer.append(self.slot_idx, name, x, window, lengths) for name, x in tokens.items()
        )

    def state(self, name: str) -> torch.Tensor | None:
        """See ``Slot.state``."""
        value = self._memory().states.get(name)
        if value is None or torch.is_grad_enabled():
            # a static cache is written in place, and autograd needs the old values
            static = isinstance(self._layer(), StaticHybridCacheLayer)
            return value.clone() if value is not None and static else value
        return value.clone() if value.requires_grad else value

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """See ``Slot.set_state``."""
        layer = self._layer()
        if layer.record_past and layer.slot(self.slot_idx).recording is None:
            raise ValueError(
                f"layer {self.layer_idx}: expected a mixer that records its inputs for speculative"
                " decoding, got set_state without cache.begin; try deriving the mixer from StateMixer,"
                " or calling cache.begin in each forward"
            )
        layer.set_state(self.slot_idx, name, value)

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """See ``Slot.begin``."""
        layer, memory = self._layer(), self._memory()
        recording = memory.recording
        if recording is not None and recording.settled:
            if recording.removed:
                self._roll_back(layer, memory, recording, run)
            memory.recording = None
        if not layer.record_past:
            memory.recording = None
            return
        if memory.recording is None:
            # copies, as an op may overwrite the last state with the next one
            states = {name: state.clone() for name, state in memory.states.items()}
            memory.recording = Recording(states)
        memory.recording.inputs.append(x.detach())
        memory.recording.real.append(_real_tokens(x, segments))

    @staticmethod
    def _roll_back(
        layer: HybridCacheLayer,
        memory: SlotMemory,
        recording: Recording,
        run: Callable[[torch.Tensor], object],
    ) -> None:
        memory.states = recording.states
        again = recording.kept()
        if again.shape[1]:
            record_past, layer.record_past = layer.record_past, False
            run(again)
            layer.record_past = record_past

    def _memory(self) -> SlotMemory:
        return self._layer().slot(self.slot_idx)

    def _layer(self) -> HybridCacheLayer:
        layers = self.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, HybridCacheLayer):
            raise ValueError(
                f"layer {self.layer_idx} of this cache cannot hold a recurrent state: expected"
                f" {HybridCacheLayer.__name__}, got {type(layer).__name__}; try"
                " DynamicCache(config=model.config), or no cache, so that the model creates it"
            )
        return layer


@dataclass(frozen=True)
class CachePast(Past):
    """``hybrid.nn.past.Past`` in a transformers cache."""

    cache: Cache

    def slot(self, layer_idx: int, slot_idx: int) -> CacheSlot:
        """See ``Past.slot``."""
        return CacheSlot(self.cache, layer_idx, slot_idx)

    def count(self, x: torch.Tensor) -> None:
        """Count the tokens of x (B, T, D), after every layer has run on them."""
        for layer in self.cache.layers:
            if isinstance(layer, HybridCacheLayer):
                layer.count(x.shape[1], x.device)


def _real_tokens(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Return a bool mask (T,) of the columns of x (B, T, D) that are not padding."""
    if segments.index is None:
        return torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if len(x) > 1:
        raise ValueError(_SEVERAL_ROWS)
    real = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return real.index_fill(0, segments.index, True)
