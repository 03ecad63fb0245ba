"""What one mixer sees of transformers' own cache.

There is no cache class here. `DynamicCache(config=...)` already holds keys and values for softmax
layers, convolution and recurrent states for linear ones, and both for parallel layers; `LayerCache`
only names the slot that belongs to one mixer of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


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
        """The recurrent state (B, H, K, V) after the last token seen, or None at the start."""
        return self._state("recurrent_states")

    def set_recurrent_state(self, state: torch.Tensor) -> None:
        """Store the state after the last token."""
        layer = self._linear_layer()
        self.cache.update_recurrent_state(state, self.layer_idx, state_idx=self.state_idx)
        # transformers raises this flag with the convolution state only, and some mixers have none
        layer.has_previous_state[self.state_idx] = True

    def conv_state(self) -> torch.Tensor | None:
        """The last W - 1 inputs of the convolution, (B, D, W - 1), or None at the start."""
        return self._state("conv_states")

    def set_conv_state(self, state: torch.Tensor) -> None:
        """Store the last W - 1 inputs. The stock layer keeps the newest columns, which are these."""
        self._linear_layer()
        self.cache.update_conv_state(state, self.layer_idx, state_idx=self.state_idx)

    def _state(self, kind: str) -> torch.Tensor | None:
        layer = self._linear_layer()
        if not layer.has_previous_state[self.state_idx]:
            return None
        state = getattr(layer, kind)[self.state_idx]
        # the stock layer updates states in place; under autograd the graph must keep the old values
        return state.clone() if state is not None and torch.is_grad_enabled() else state

    def _linear_layer(self) -> LinearAttentionCacheLayerMixin:
        layers = self.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"layer {self.layer_idx} of this cache cannot hold a recurrent state; make the cache"
                " with DynamicCache(config=model.config), or pass none and let the model make it"
            )
        return layer


def past_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens already in the cache, by its softmax layers; 0 where no layer counts (nor needs) them."""
    if cache is None or not cache.layers:
        return 0
    counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return cache.get_seq_length() if counts else 0


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
