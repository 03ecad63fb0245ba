"""Slots of mixers in transformers' caches, and the cache layer that holds them.

`DynamicCache(config=...)` and `StaticCache(config=...)`, which `generate` makes too, choose the class of
each of their layers by `config.layer_types`. Layers of softmax attention alone have transformers' own
class; all others have one of these, made here under two names:

    hybrid_states   states, and tokens of a window: what they hold does not grow
    hybrid_keys     keys and values of all tokens as well

Speculative decoding takes tokens back (`Cache.crop`). Columns of tokens can be dropped; recurrent states
cannot be unwound. So while transformers asks its layers to record the past, a slot with states keeps
those at a mark and the inputs of its mixer since; after a crop, the mixer runs on those that are left
once more (`CacheSlot.begin`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)

from hybrid.config.spec import HYBRID_KEYS, HYBRID_STATES
from hybrid.nn.packing import Segments
from hybrid.nn.past import Past

_SEVERAL_ROWS = (
    "a padded batch of several rows cannot be recorded for speculative decoding; one row can"
)

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Recording:
    """What it takes to roll the states of one slot back to any token since a mark."""

    states: dict[str, torch.Tensor]
    """As they were at the mark."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """The mixer's inputs since, (B, t, D) each."""
    real: list[torch.Tensor] = field(default_factory=list)
    """Which of them are not padding, (t,) each."""
    removed: int = 0
    """How many of them were taken back."""
    settled: bool = False
    """Whether `crop` was called since the last input: the next forward sets a new mark."""

    @property
    def length(self) -> int:
        """Tokens since the mark, padding included, that are left."""
        return sum(x.shape[1] for x in self.inputs) - self.removed

    def kept(self) -> torch.Tensor:
        """The inputs that are left, without padding, (B, t, D)."""
        left = self.length
        return torch.cat(self.inputs, dim=1)[:, :left][:, torch.cat(self.real)[:left]]


@dataclass
class Columns:
    """The tokens of one name in one slot, (B, heads, S, dim), S growing up to the window."""

    window: int | None
    tensor: torch.Tensor | None = None
    total: int = 0
    """Tokens since the start."""

    def append(
        self, new: torch.Tensor, lengths: torch.Tensor | None, *, recording: bool
    ) -> torch.Tensor:
        """See `Slot.append`; while recording, columns that have left the window are kept."""
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
        """How many tokens can be taken back, so that what the next one sees is left."""
        held = 0 if self.tensor is None else self.tensor.shape[2]
        if self.window is None or held == self.total:
            return held
        return held - (self.window - 1)

    def crop(self, tokens: int) -> None:
        """Drop the last columns."""
        if self.tensor is not None and tokens:
            self.tensor = self.tensor[:, :, : self.tensor.shape[2] - tokens]
            self.total -= tokens


@dataclass
class SlotMemory:
    """What one slot holds."""

    tokens: dict[str, Columns] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    recording: Recording | None = None


class HybridCacheLayer(CacheLayerMixin):
    """Tokens and states of the mixers of one layer, by slot and name.

    Attributes:
        slots: slot number -> what it holds.
        record_past: whether tokens may be taken back that were not yet written.
        length: tokens so far.
        layer_type: that of the model's layers, by which `hybrid.nn.input_checks` knows another layout.
    """

    layer_type = HYBRID_KEYS
    is_croppable = True
    is_compileable = False
    is_sliding = False
    supports_early_init = False
    is_initialized = True

    def __init__(self, **kwargs: object) -> None:
        self.slots: dict[int, SlotMemory] = {}
        self.record_past = False
        self.length: int | torch.Tensor = 0

    # What slots do.

    def slot(self, slot_idx: int) -> SlotMemory:
        """What the slot of this number holds."""
        return self.slots.setdefault(slot_idx, SlotMemory())

    def append(
        self,
        slot_idx: int,
        name: str,
        new: torch.Tensor,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Slot.append`, which is of several names."""
        columns = self.slot(slot_idx).tokens.setdefault(name, Columns(window))
        return columns.append(new, lengths, recording=self.record_past)

    def set_state(self, slot_idx: int, name: str, value: torch.Tensor) -> None:
        """See `Slot.set_state`."""
        if not torch.compiler.is_compiling() and not value.requires_grad and _is_part(value):
            value = value.clone()  # a view would hold on to the whole prefill
        self.slot(slot_idx).states[name] = value

    def count(self, time: int, device: torch.device) -> None:
        """Note that so many tokens were run."""
        self.length = self.length + time

    # What transformers asks of a cache layer.

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.slots.keys()})"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the keys and values of slot 0, from outside a model; they are counted."""
        k = self.append(0, "k", key_states)
        v = self.append(0, "v", value_states)
        self.count(key_states.shape[2], key_states.device)
        return k, v

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: slots come with their first use."""

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Tokens so far, whether or not any of them are kept."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys in all and the place of the first, of mixers that keep all."""
        return int(self.length) + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Make it possible to take back the tokens that come from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: their number, negative as transformers passes it, or 0.

        Raises:
            ValueError: a positive number, or more than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}"
            )
        tokens = -tokens_to_remove
        for memory in self.slots.values():
            self._check_crop(memory, tokens)
        for memory in self.slots.values():
            for columns in memory.tokens.values():
                columns.crop(tokens)
            if memory.recording is not None:
                memory.recording.removed += tokens
                memory.recording.settled = True
        self.length = self.length - tokens

    def _check_crop(self, memory: SlotMemory, tokens: int) -> None:
        spare = [columns.spare for columns in memory.tokens.values()]
        if memory.states:
            spare.append(0 if memory.recording is None else memory.recording.length)
        if tokens > min(spare, default=tokens):
            raise ValueError(
                f"crop: the cache was cropped by {tokens} tokens, more than the {min(spare)} tokens that"
                " a layer has recorded; states and windows cannot go back further. Call"
                " cache.activate_past_recording() before the tokens that may be taken back"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.slots.clear()
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in a new order, for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Some rows only."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """To the memory of the host, where transformers offloads keys."""
        self.device = next((x.device for x in self.tensors()), None)
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back from there."""
        device = getattr(self, "device", None)
        if device is not None:
            self._map(lambda x: x.to(device, non_blocking=True))

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Keys of the first slot that has any."""
        return self._first("k")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Values of the first slot that has any."""
        return self._first("v")

    def tensors(self) -> list[torch.Tensor]:
        """Everything it holds but recordings."""
        found = []
        for memory in self.slots.values():
            found += [c.tensor for c in memory.tokens.values() if c.tensor is not None]
            found += memory.states.values()
        return found

    def _first(self, name: str) -> torch.Tensor | None:
        for memory in self.slots.values():
            if name in memory.tokens:
                return memory.tokens[name].tensor
        return None

    def _map(self, function: Map) -> None:
        for memory in self.slots.values():
            for columns in memory.tokens.values():
                if columns.tensor is not None:
                    columns.tensor = function(columns.tensor)
            _map_states(memory.states, function)
            if memory.recording is not None:
                _map_states(memory.recording.states, function)
                memory.recording.inputs = [function(x) for x in memory.recording.inputs]


class StaticHybridCacheLayer(HybridCacheLayer):
    """The same for a `StaticCache`: tensors of fixed shapes, written in place, for compiled decoding.

    Tokens of a window are the last W - 1, zeros before the first token; all others stand in
    `max_cache_len` columns.
    """

    is_croppable = False
    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs: object) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.length = torch.tensor(0, dtype=torch.long)

    def append(
        self,
        slot_idx: int,
        name: str,
        new: torch.Tensor,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `HybridCacheLayer.append`."""
        columns = self.slot(slot_idx).tokens.setdefault(name, Columns(window))
        if columns.tensor is None:
            size = self.max_cache_len if window is None else window - 1
            columns.tensor = new.new_zeros(*new.shape[:2], size, new.shape[3])
            _mark_static(columns.tensor)
        if window is None:
            place = torch.arange(new.shape[2], device=new.device) + self.length.to(new.device)
            columns.tensor.index_copy_(2, place, new)
            return columns.tensor
        both = torch.cat([columns.tensor, new], dim=2)
        columns.tensor.copy_(last_columns(both, new.shape[2], lengths, window - 1))
        return both

    def set_state(self, slot_idx: int, name: str, value: torch.Tensor) -> None:
        """See `Slot.set_state`."""
        states = self.slot(slot_idx).states
        if name in states and states[name].shape == value.shape:
            states[name].copy_(value)
        else:
            states[name] = value.clone()
            _mark_static(states[name])

    def count(self, time: int, device: torch.device) -> None:
        """See `HybridCacheLayer.count`; in place."""
        if self.length.device != device:
            self.length = self.length.to(device)
            _mark_static(self.length)
        self.length.add_(time)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `HybridCacheLayer.get_mask_sizes`."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """`max_cache_len`."""
        return self.max_cache_len

    def _check_crop(self, memory: SlotMemory, tokens: int) -> None:
        super()._check_crop(memory, tokens)
        if tokens and any(columns.window is not None for columns in memory.tokens.values()):
            raise ValueError(
                "a static cache cannot be cropped in layers with a window; use a DynamicCache"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.slots.clear()
        self.length.zero_()


class BoundedCacheLayer(HybridCacheLayer):
    """`HybridCacheLayer` without keys of all tokens: transformers does not offload such layers."""

    layer_type = HYBRID_STATES
    is_sliding = True


class StaticBoundedCacheLayer(StaticHybridCacheLayer):
    """`StaticHybridCacheLayer` without keys of all tokens."""

    layer_type = HYBRID_STATES
    is_sliding = True


DYNAMIC_LAYER_TYPE_MAPPING[HYBRID_KEYS] = HybridCacheLayer
DYNAMIC_LAYER_TYPE_MAPPING[HYBRID_STATES] = BoundedCacheLayer
STATIC_LAYER_TYPE_MAPPING[HYBRID_KEYS] = StaticHybridCacheLayer
STATIC_LAYER_TYPE_MAPPING[HYBRID_STATES] = StaticBoundedCacheLayer


@dataclass(frozen=True)
class CacheSlot:
    """`hybrid.nn.past.Slot` in a transformers cache."""

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
        """See `Slot.append`."""
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
        """See `Slot.state`."""
        value = self._memory().states.get(name)
        if value is None or torch.is_grad_enabled():
            # a static cache writes in place, and the graph must keep the old values
            static = isinstance(self._layer(), StaticHybridCacheLayer)
            return value.clone() if value is not None and static else value
        return value.clone() if value.requires_grad else value

    def set_state(self, name: str, value: torch.Tensor) -> None:
        """See `Slot.set_state`."""
        layer = self._layer()
        if layer.record_past and layer.slot(self.slot_idx).recording is None:
            raise ValueError(
                f"layer {self.layer_idx} is asked to record the past, for speculative decoding, and its"
                " mixer does not: derive it from StateMixer, or call cache.begin before each forward"
            )
        layer.set_state(self.slot_idx, name, value)

    def begin(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """See `Slot.begin`."""
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
            # copies: an op may write the next state where the last one lies
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
                f"layer {self.layer_idx} of this cache cannot hold a recurrent state; make the cache"
                " with DynamicCache(config=model.config), or pass none and let the model make it"
            )
        return layer


@dataclass(frozen=True)
class CachePast(Past):
    """`hybrid.nn.past.Past` in a transformers cache."""

    cache: Cache

    def slot(self, layer_idx: int, slot_idx: int) -> CacheSlot:
        """See `Past.slot`."""
        return CacheSlot(self.cache, layer_idx, slot_idx)

    def count(self, x: torch.Tensor) -> None:
        """Note that the tokens of x (B, T, D) were run by every layer."""
        for layer in self.cache.layers:
            if isinstance(layer, HybridCacheLayer):
                layer.count(x.shape[1], x.device)


def last_columns(
    x: torch.Tensor, time: int, lengths: torch.Tensor | None, kept: int
) -> torch.Tensor:
    """The last columns (B, heads, kept, dim) of x (B, heads, S, dim) that hold tokens.

    Args:
        x: earlier columns, and behind them `time` new ones.
        lengths: (B,), how many of these hold tokens; None for all.
        kept: how many columns to return; where a row has fewer tokens, the first ones are anything.
    """
    past = x.shape[2] - time
    if lengths is None:
        last = x[:, :, x.shape[2] - kept :]
        # a view would hold on to a whole prefill
        return last.clone() if x.shape[2] > 2 * kept else last
    place = (lengths + past - kept)[:, None] + torch.arange(kept, device=x.device)
    place = place.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, place)


def _is_part(x: torch.Tensor) -> bool:
    """Whether x is a view of more memory than it has elements."""
    return x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _map_states(states: dict[str, torch.Tensor], function: Map) -> None:
    for name, state in states.items():
        states[name] = function(state)


def _mark_static(x: torch.Tensor) -> None:
    """As transformers does, so that compiled decoding can use captured graphs."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)


def _real_tokens(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Which columns of x (B, T, D) are not padding, (T,)."""
    if segments.index is None:
        return torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if len(x) > 1:
        raise ValueError(_SEVERAL_ROWS)
    real = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return real.index_fill(0, segments.index, True)
