"""What one mixer sees of transformers' own cache.

There is no cache class here. `DynamicCache(config=...)` already holds keys and values for softmax
layers, convolution and recurrent states for linear ones, and both for parallel layers; `LayerCache`
only names the slot that belongs to one mixer of one layer.

Speculative decoding takes tokens back (`Cache.crop`). Keys and values of those tokens can be dropped;
a recurrent state cannot be unwound. So while transformers asks its layers to record the past, a slot
keeps the state at a mark and the inputs of its mixer since; after a crop, the mixer runs those of the
kept tokens again from the mark. See `LayerCache.resume`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from hybrid.nn.packing import Segments


@dataclass
class Recording:
    """What it takes to roll one slot back to any token since a mark."""

    recurrent: torch.Tensor | None
    conv: torch.Tensor | None
    started: bool
    """Whether the slot held anything at the mark."""
    tail: torch.Tensor | None
    """The convolution state now; its place in the stock layer holds the ruler."""
    inputs: list[torch.Tensor] = field(default_factory=list)
    """The mixer's inputs since the mark, (B, t, D) each."""
    real: list[torch.Tensor] = field(default_factory=list)
    """Which of them are no padding, (t,) each."""

    @property
    def length(self) -> int:
        """Tokens since the mark, padding included."""
        return sum(x.shape[1] for x in self.inputs)

    def first(self, tokens: int) -> torch.Tensor:
        """The inputs of so many tokens after the mark, without padding."""
        return torch.cat(self.inputs, dim=1)[:, :tokens][:, torch.cat(self.real)[:tokens]]


# Stands in for a convolution width while recording, so that `crop` takes from the end alone.
_UNLIMITED = 2**31


@dataclass(frozen=True)
class LayerCache:
    """The slot of one mixer: layer `layer_idx` of `cache`, linear state number `state_idx`."""

    cache: Cache
    layer_idx: int
    state_idx: int = 0

    def update_kv(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, H_kv, T, dim); returns all that are to be attended to."""
        return self.cache.update(k, v, self.layer_idx)

    def recurrent_state(self) -> torch.Tensor | None:
        """The recurrent state (B, H, K, V) after the last token seen, or None at the start.

        Without gradients this is the slot's own memory, and the op that takes it may write the next
        state there; what is kept to roll back to is a copy.
        """
        layer = self._checked_layer()
        if not layer.has_previous_state[self.state_idx]:
            return None
        return _fit_for_autograd(layer.recurrent_states[self.state_idx])

    def set_recurrent_state(self, state: torch.Tensor) -> None:
        """Store the state after the last token."""
        layer = self._checked_layer()
        self.cache.update_recurrent_state(state, self.layer_idx, state_idx=self.state_idx)
        # transformers raises this flag with the convolution state only, and some mixers have none
        layer.has_previous_state[self.state_idx] = True

    def conv_state(self) -> torch.Tensor | None:
        """The last W - 1 inputs of the convolution, (B, D, W - 1), or None at the start."""
        layer = self._checked_layer()
        if not layer.has_previous_state[self.state_idx]:
            return None
        recording = self._recording(layer)
        return _fit_for_autograd(
            layer.conv_states[self.state_idx] if recording is None else recording.tail
        )

    def set_conv_state(self, state: torch.Tensor) -> None:
        """Store the last W - 1 inputs. The stock layer keeps the newest columns, which are these."""
        layer = self._checked_layer()
        recording = self._recording(layer)
        if recording is None:
            self.cache.update_conv_state(state, self.layer_idx, state_idx=self.state_idx)
        else:
            recording.tail = state
            layer.has_previous_state[self.state_idx] = True

    # Rolling back.

    def resume(
        self, x: torch.Tensor, segments: Segments, run: Callable[[torch.Tensor], object]
    ) -> None:
        """Bring the states in line with the tokens that are left, and note x; before each forward.

        Args:
            x: the mixer's input in this forward, (B, T, D), as it is before packing.
            segments: its padding.
            run: runs the mixer on inputs (B, t, D) for what it does to this slot.

        Raises:
            ValueError: more tokens were taken back than were recorded, or a padded batch of several
                rows is to be recorded.
        """
        layer = self._linear_layer()
        recording = self._recording(layer)
        if recording is None and not layer.record_past:
            return
        if recording is not None:
            recording = self._follow_crops(layer, recording, run)
        if not layer.record_past:
            return
        if recording is None:
            recording = self._mark(layer)
        recording.inputs.append(x.detach())
        recording.real.append(_real_tokens(x, segments))
        self._lay_ruler(layer, recording)

    def _follow_crops(
        self,
        layer: LinearAttentionCacheLayerMixin,
        recording: Recording,
        run: Callable[[torch.Tensor], object],
    ) -> Recording | None:
        """Undo what `crop` took back; None where a new mark is due."""
        ruler = layer.conv_states[self.state_idx]
        if not layer.has_previous_state[self.state_idx]:  # the whole cache was reset
            self._unmark(layer, None)
            return None
        if not ruler.numel():
            raise ValueError(
                f"the cache was cropped by more than the {recording.length} tokens that layer"
                f" {self.layer_idx} has recorded; a recurrent state cannot go back further"
            )
        kept = int(ruler[-1])
        if kept < recording.length:
            self._unmark(layer, recording.conv)
            layer.has_previous_state[self.state_idx] = recording.started
            recurrent = layer.recurrent_states[self.state_idx]
            if recurrent is not None:
                # zeros where there was none: the convolution raises the flag before this one is read
                before = recording.recurrent
                recurrent.copy_(torch.zeros_like(recurrent) if before is None else before)
            again = recording.first(kept)
            if again.shape[1]:
                recording_past, layer.record_past = layer.record_past, False
                run(again)
                layer.record_past = recording_past
            return None
        if layer.record_past:
            return recording
        self._unmark(layer, recording.tail)
        return None

    def _mark(self, layer: LinearAttentionCacheLayerMixin) -> Recording:
        """Remember the states as they are, and record from here."""
        i = self.state_idx
        started = layer.has_previous_state[i]
        recurrent = layer.recurrent_states[i]
        recording = Recording(
            recurrent=recurrent.clone() if started and recurrent is not None else None,
            conv=layer.conv_states[i] if started else None,
            started=started,
            tail=layer.conv_states[i] if started else None,
        )
        vars(layer).setdefault("recordings", {})[i] = recording
        layer.__class__ = _croppable(type(layer))
        return recording

    def _unmark(self, layer: LinearAttentionCacheLayerMixin, conv: torch.Tensor | None) -> None:
        """Forget the mark, and give the stock layer a convolution state back."""
        i = self.state_idx
        del layer.recordings[i]
        layer.conv_states[i] = conv
        layer.is_conv_states_initialized[i] = conv is not None
        layer.conv_kernel_size[i] = None if conv is None else conv.shape[-1]

    def _lay_ruler(self, layer: LinearAttentionCacheLayerMixin, recording: Recording) -> None:
        """Put 0, 1, ..., length where `crop` cuts: the last number left is the tokens kept."""
        layer.conv_states[self.state_idx] = torch.arange(recording.length + 1, device="cpu")
        layer.conv_kernel_size[self.state_idx] = _UNLIMITED

    def _recording(self, layer: LinearAttentionCacheLayerMixin) -> Recording | None:
        return getattr(layer, "recordings", {}).get(self.state_idx)

    def _checked_layer(self) -> LinearAttentionCacheLayerMixin:
        layer = self._linear_layer()
        if layer.record_past and self._recording(layer) is None:
            raise ValueError(
                f"layer {self.layer_idx} is asked to record the past, for speculative decoding, and its"
                " mixer does not: derive it from StateMixer, or call cache.resume before each forward"
            )
        return layer

    def _linear_layer(self) -> LinearAttentionCacheLayerMixin:
        layers = self.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"layer {self.layer_idx} of this cache cannot hold a recurrent state; make the cache"
                " with DynamicCache(config=model.config), or pass none and let the model make it"
            )
        return layer


@functools.cache
def _croppable(kind: type[LinearAttentionCacheLayerMixin]) -> type[LinearAttentionCacheLayerMixin]:
    """A class of cache layers whose states can be rolled back, because their slots record them.

    transformers takes recurrent states to be lost, and from 5.24 on asks before it drafts tokens.
    """
    if kind.is_croppable is True:
        return kind
    return type(kind.__name__, (kind,), {"is_croppable": True, "__module__": kind.__module__})


def _fit_for_autograd(state: torch.Tensor | None) -> torch.Tensor | None:
    # the stock layer updates states in place; under autograd the graph must keep the old values
    return state.clone() if state is not None and torch.is_grad_enabled() else state


def _real_tokens(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Which columns of x (B, T, D) are no padding, (T,)."""
    if segments.index is None:
        return torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    if len(x) > 1:
        raise ValueError(
            "a padded batch of several rows cannot be recorded for speculative decoding; one row can"
        )
    real = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return real.index_fill(0, segments.index, True)


def fill_unused(cache: Cache) -> None:
    """Give `crop` something to cut in slots that no mixer uses; it stumbles over None."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) and layer.record_past:
            for i in range(layer.number_of_states):
                if layer.conv_states[i] is None:
                    layer.conv_states[i] = torch.arange(1, device="cpu")
                    layer.conv_kernel_size[i] = _UNLIMITED


def count_tokens(cache: Cache, layer_idx: int, x: torch.Tensor) -> None:
    """Let a stack without keys count its tokens: empty keys for every token of x (B, T, D)."""
    empty = x.new_empty(x.shape[0], 1, x.shape[1], 0)
    cache.update(empty, empty, layer_idx)


def past_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens already in the cache, by its softmax layers; 0 where no layer counts (nor needs) them."""
    if cache is None or not cache.layers:
        return 0
    counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return cache.get_seq_length() if counts else 0


def update_paged(
    k: torch.Tensor, v: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Add keys and values to the paged cache of continuous batching, where there is one.

    Before transformers 5.24 its attention functions do so themselves, and take the cache for it.

    Args:
        k, v: (1, H_kv, T, dim) of the new tokens.
        layer_idx: the layer.
        kwargs: of the attention function; `paged` holds the cache and where to read and write.

    Returns:
        k, v (1, H_kv, S, dim) of all tokens to be attended to, and the attention function's keywords.
    """
    kwargs = dict(kwargs)
    paged = kwargs.pop("paged", None)
    if paged is None:
        return k, v, kwargs
    kwargs |= paged
    if "kwargs" in inspect.signature(paged["cache"].update).parameters:
        k, v = kwargs.pop("cache").update(k, v, layer_idx, kwargs=kwargs)
    return k, v, kwargs


def is_paged(cache: object) -> bool:
    """Whether a cache is that of continuous batching, which attention functions update themselves."""
    return type(cache).__name__ == "PagedAttentionCache"


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing has been stored yet, by softmax layers and linear ones alike."""
    if cache is None:
        return True
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0:
            return False
        if isinstance(layer, LinearAttentionCacheLayerMixin) and any(
            layer.has_previous_state.values()
        ):
            return False
    return True
