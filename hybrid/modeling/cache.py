"""Cache layers for mixers in transformers' caches, and the slots in them.

``DynamicCache(config=...)`` and ``StaticCache(config=...)``, which ``generate`` also creates, select the
class of each layer by ``config.layer_types``. Layers with only softmax attention use transformers' own
class. All other layers use a class of this module, under one of three layer types:

    hybrid_states   states and the tokens of a window: the size is bounded
    hybrid_keys     also keys and values of all tokens
    hybrid_none     nothing, for a layer without a mixer. transformers' own type for it, "moe", has a
                    layer of linear attention before 5.24, which cannot be cropped while it is empty.

Speculative decoding removes tokens (``Cache.crop``). Columns of tokens can be dropped, but a recurrent
state cannot be reversed. While transformers asks its layers to record the past, a slot with states
therefore saves the states at a mark and the inputs of its mixer since the mark. After a crop, the mixer
runs again on the remaining inputs (``CacheSlot.begin``).
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

from hybrid.config.spec import HYBRID_KEYS, HYBRID_NONE, HYBRID_STATES
from hybrid.nn.packing import Segments
from hybrid.nn.past import Past

_SEVERAL_ROWS = (
    "attention_mask: expected one row, or no padding, while the cache records the past for speculative"
    " decoding, got a padded batch of several rows; try a batch of one row"
)

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


class HybridCacheLayer(CacheLayerMixin):
    """Cache layer with the tokens and states of the mixers of one layer, by slot and name.

    Attributes:
        slots: slot number -> contents.
        record_past: whether to record future tokens, so that ``crop`` can remove them.
        length: number of tokens so far.
        layer_type: layer type of this class; ``hybrid.nn.input_checks`` compares it with the layout.
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

    # Methods for slots.

    def slot(self, slot_idx: int) -> SlotMemory:
        """Return the contents of a slot."""
        return self.slots.setdefault(slot_idx, SlotMemory())

    def append(
        self,
        slot_idx: int,
        name: str,
        new: torch.Tensor,
        window: int | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Slot.append``, which appends several names."""
        columns = self.slot(slot_idx).tokens.setdefault(name, Columns(window))
        return columns.append(new, lengths, recording=self.record_past)

    def set_state(self, slot_idx: int, name: str, value: torch.Tensor) -> None:
        """See ``Slot.set_state``."""
        if not torch.compiler.is_compiling() and not value.requires_grad and _is_part(value):
            value = value.clone()  # a view would keep the memory of the whole prefill
        self.slot(slot_idx).states[name] = value

    def count(self, time: int, device: torch.device) -> None:
        """Add ``time`` tokens to the length."""
        self.length = self.length + time

    # Interface of transformers' cache layers.

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.slots.keys()})"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the keys and values of slot 0 from outside a model, and count the tokens."""
        k = self.append(0, "k", key_states)
        v = self.append(0, "v", value_states)
        self.count(key_states.shape[2], key_states.device)
        return k, v

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: slots are created on first use."""

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Return the number of tokens so far, cached or not."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and the position of the first, for mixers that cache all keys."""
        return int(self.length) + query_length, 0

    def get_max_length(self) -> int:
        """Return -1 for no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Record future tokens, so that ``crop`` can remove them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: number of tokens as transformers passes it: negative, or 0.

        Raises:
            ValueError: a positive number, or more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected minus the number of tokens to remove, got {tokens_to_remove}; try"
                f" {-tokens_to_remove}"
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
                f"crop: expected at most {min(spare)} tokens, which a layer with a state or a window has"
                f" recorded, got {tokens}; try cache.activate_past_recording() before the tokens to"
                " remove are run"
            )

    def reset(self) -> None:
        """Clear the cache."""
        self.slots.clear()
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows, for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move all tensors to host memory, when transformers offloads the cache."""
        self.device = next((x.device for x in self.tensors()), None)
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move all tensors back to their device."""
        device = getattr(self, "device", None)
        if device is not None:
            self._map(lambda x: x.to(device, non_blocking=True))

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Keys of the first slot with keys."""
        return self._first("k")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Values of the first slot with values."""
        return self._first("v")

    def tensors(self) -> list[torch.Tensor]:
        """Return all cached tensors except recordings."""
        tensors = []
        for memory in self.slots.values():
            tensors += [c.tensor for c in memory.tokens.values() if c.tensor is not None]
            tensors += memory.states.values()
        return tensors

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
    """``HybridCacheLayer`` for a ``StaticCache``: fixed shapes, written in place, for compiled decode.

    A window holds the last W - 1 tokens, with zeros before the first token. Other tokens have
    ``max_cache_len`` columns.
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
        """See ``HybridCacheLayer.append``."""
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
        """See ``Slot.set_state``."""
        states = self.slot(slot_idx).states
        if name in states and states[name].shape == value.shape:
            states[name].copy_(value)
        else:
            states[name] = value.clone()
            _mark_static(states[name])

    def count(self, time: int, device: torch.device) -> None:
        """See ``HybridCacheLayer.count``; updates the length in place."""
        if self.length.device != device:
            self.length = self.length.to(device)
            _mark_static(self.length)
        self.length.add_(time)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See ``HybridCacheLayer.get_mask_sizes``."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Return ``max_cache_len``."""
        return self.max_cache_len

    def _check_crop(self, memory: SlotMemory, tokens: int) -> None:
        super()._check_crop(memory, tokens)
        if tokens and any(columns.window is not None for columns in memory.tokens.values()):
            raise ValueError(
                f"crop: expected 0 tokens in a static cache with a window, got {tokens}; try a"
                " DynamicCache"
            )

    def reset(self) -> None:
        """Clear the cache."""
        self.slots.clear()
        self.length.zero_()


class BoundedCacheLayer(HybridCacheLayer):
    """``HybridCacheLayer`` without keys of all tokens; transformers does not offload such layers."""

    layer_type = HYBRID_STATES
    is_sliding = True


class StaticBoundedCacheLayer(StaticHybridCacheLayer):
    """``StaticHybridCacheLayer`` without keys of all tokens."""

    layer_type = HYBRID_STATES
    is_sliding = True


class EmptyCacheLayer(BoundedCacheLayer):
    """Cache layer of a layer without a mixer, in every cache."""

    layer_type = HYBRID_NONE
    is_compileable = True


DYNAMIC_LAYER_TYPE_MAPPING[HYBRID_KEYS] = HybridCacheLayer
DYNAMIC_LAYER_TYPE_MAPPING[HYBRID_STATES] = BoundedCacheLayer
DYNAMIC_LAYER_TYPE_MAPPING[HYBRID_NONE] = EmptyCacheLayer
STATIC_LAYER_TYPE_MAPPING[HYBRID_NONE] = EmptyCacheLayer
STATIC_LAYER_TYPE_MAPPING[HYBRID_KEYS] = StaticHybridCacheLayer
STATIC_LAYER_TYPE_MAPPING[HYBRID_STATES] = StaticBoundedCacheLayer


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


def _is_part(x: torch.Tensor) -> bool:
    """Return whether x is a view of more memory than its own elements."""
    return x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _map_states(states: dict[str, torch.Tensor], function: Map) -> None:
    for name, state in states.items():
        states[name] = function(state)


def _mark_static(x: torch.Tensor) -> None:
    """Mark the address of x as static, as transformers does, so that CUDA graphs can capture it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)


def _real_tokens(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Return a bool mask (T,) of the columns of x (B, T, D) that are not padding."""
    if segments.index is None:
        return torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if len(x) > 1:
        raise ValueError(_SEVERAL_ROWS)
    real = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return real.index_fill(0, segments.index, True)
