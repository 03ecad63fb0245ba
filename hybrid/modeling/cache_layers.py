"""Cache layers for mixers in transformers' caches.

``DynamicCache(config=...)`` and ``StaticCache(config=...)``, which ``generate`` also creates, select the
class of each layer by ``config.layer_types``. Layers with only softmax attention use transformers' own
class. All other layers use a class of this module, under one of three layer types:

    hybrid_states   states and the tokens of a window: the size is bounded
    hybrid_keys     also keys and values of all tokens
    hybrid_none     nothing, for a layer without a mixer. transformers' own type for it, "moe", has a
                    layer of linear attention before 5.24, which cannot be cropped while it is empty.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
)

from hybrid.config.spec import HYBRID_KEYS, HYBRID_NONE, HYBRID_STATES
from hybrid.modeling.cache_memory import Columns, Map, SlotMemory, last_columns


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
        return [x for memory in self.slots.values() for x in memory.tensors()]

    def _first(self, name: str) -> torch.Tensor | None:
        for memory in self.slots.values():
            if name in memory.tokens:
                return memory.tokens[name].tensor
        return None

    def _map(self, function: Map) -> None:
        for memory in self.slots.values():
            memory.map(function)


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


def _is_part(x: torch.Tensor) -> bool:
    """Return whether x is a view of more memory than its own elements."""
    return x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _mark_static(x: torch.Tensor) -> None:
    """Mark the address of x as static, as transformers does, so that CUDA graphs can capture it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
