"""Queries of a forward pass to transformers' caches, before any layer runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def past_length(cache: Cache | None) -> int | torch.Tensor:
    """Return the number of tokens in the cache."""
    if cache is None or not cache.layers:
        return 0
    counts = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return cache.get_seq_length() if counts else 0


def is_empty(cache: Cache | None) -> bool:
    """Return whether the cache has stored no tokens."""
    return cache is None or all(
        int(layer.get_seq_length()) == 0
        for layer in cache.layers
        if isinstance(layer, CacheLayerMixin)
    )


def update_paged(
    k: torch.Tensor, v: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Add keys and values to the paged cache of continuous batching, if there is one.

    Before transformers 5.24, its attention functions receive the cache and update it themselves.

    Args:
        k, v: (1, H_kv, T, dim) of the new tokens.
        layer_idx: index of the layer.
        kwargs: keyword arguments of the attention function; ``paged`` holds the cache and the indices to
            read and write.

    Returns:
        k, v (1, H_kv, S, dim) of all tokens to attend to, and the attention function's keywords.
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
    """Return whether a cache is the paged cache of continuous batching."""
    return type(cache).__name__ == "PagedAttentionCache"
