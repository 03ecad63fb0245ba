"""Inputs of a forward pass that do not fit the model, refused by name.

Shapes, dtypes and types alone: nothing here waits for a device. B batch, T time, D model dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache

from hybrid.config.options import did_you_mean
from hybrid.nn.packing import check_integers, check_mask


def check_tokens(ids: Any, embeddings: Any, width: int) -> None:
    """Refuse token ids that are not (B, T) integers, and embeddings that are not (B, T, D) floats.

    Raises:
        ValueError: both or neither are given, or one is of another shape or dtype.
    """
    if (ids is None) == (embeddings is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if embeddings is None:
        check_integers("input_ids", ids)
        fits, expected, x = ids.ndim == 2, "(B, T)", ids
    else:
        if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
            raise ValueError(f"inputs_embeds: expected a floating-point tensor, {_got(embeddings)}")
        fits = embeddings.ndim == 3 and embeddings.shape[2] == width
        expected, x = f"(B, T, {width})", embeddings
    if not fits or 0 in x.shape[:2]:
        name = "input_ids" if embeddings is None else "inputs_embeds"
        shape = tuple(x.shape)
        raise ValueError(f"{name}: expected {expected} with at least one token, got {shape}")


def check_cache(cache: Any, layers: int) -> None:
    """Refuse what is not a cache of transformers, or is one of a deeper model.

    Raises:
        ValueError: see above.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache: expected a Cache of transformers, got {type(cache).__name__}; make one with"
            " DynamicCache(config=model.config)"
        )
    if len(cache.layers) > layers:
        raise ValueError(
            f"cache: expected one of a model of {layers} layers, got {len(cache.layers)} layers; make"
            " one with DynamicCache(config=model.config)"
        )


def check_masks(
    masks: Mapping[Any, Any],
    batch: int,
    time: int,
    needed: tuple[str, ...],
    local: tuple[str, ...] = (),
) -> None:
    """Refuse masks by layer type that lack a type, name another, or do not fit the tokens.

    Args:
        masks: "linear_attention" (B, at least T), and "full_attention" as the attention function takes
            it, (B or 1, H or 1, T, at least T) or (B, at least T); None for none.
        batch, time: B and T.
        needed: the types of the model's layers.
        local: types whose entry is the model's own, and is not looked at.

    Raises:
        ValueError: see above.
    """
    known = ("full_attention", "linear_attention")
    for name in masks:
        if name not in known and name not in local:
            near = did_you_mean(str(name), known)
            raise ValueError(f"attention_mask: no layer type {name!r}, {near}")
    for name in needed:
        if name not in masks:
            raise ValueError(
                f"attention_mask: expected a mask for {name!r}, or None for none, got masks for"
                f" {sorted(masks)}"
            )
    for name in [name for name in known if name in masks]:
        mask = masks[name]
        if isinstance(mask, torch.Tensor):
            if name == "linear_attention" and mask.ndim != 2:
                raise ValueError(
                    f"attention_mask[{name!r}]: expected ({batch}, at least {time}), got"
                    f" {tuple(mask.shape)}"
                )
            check_mask(mask, batch, time, None)
        elif mask is not None and type(mask).__name__ != "BlockMask":  # of flex attention
            raise ValueError(f"attention_mask[{name!r}]: expected a tensor or None, {_got(mask)}")


def check_labels(labels: Any, shift_labels: Any, batch: int, time: int) -> None:
    """Refuse labels that are not (B, T) integers.

    Raises:
        ValueError: see above.
    """
    for name, value in (("labels", labels), ("shift_labels", shift_labels)):
        if value is None:
            continue
        check_integers(name, value)
        if tuple(value.shape) != (batch, time):
            raise ValueError(f"{name}: expected ({batch}, {time}), got {tuple(value.shape)}")


def _got(value: Any) -> str:
    what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    return f"got {what}"
