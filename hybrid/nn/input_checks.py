"""Inputs of a forward pass that do not fit the model, refused by name.

Nothing here waits for a device: values are looked at on the CPU alone, or after an operation has failed.
B batch, T time, D model dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from hybrid.config.options import did_you_mean
from hybrid.nn.packing import check_integers, check_mask


class OutOfVocabularyError(ValueError, IndexError):
    """A token id or a label that the vocabulary does not have."""


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


def check_cache(cache: Any, layer_types: Sequence[str]) -> None:
    """Refuse what is not a cache of transformers, or is one of a deeper model or of another layout.

    Args:
        cache: what came; its layers of ours have the name of their type as `layer_type`.
        layer_types: of the model, layer by layer.

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
    layers = len(layer_types)
    if len(cache.layers) > layers:
        raise ValueError(
            f"cache: expected one of a model of {layers} layers, got {len(cache.layers)} layers; make"
            " one with DynamicCache(config=model.config)"
        )
    for number, (layer, wanted) in enumerate(zip(cache.layers, layer_types, strict=False)):
        found = getattr(layer, "layer_type", wanted)
        if found != wanted:
            raise ValueError(
                f"cache.layers[{number}]: expected one for {wanted}, got one for {found}, as of another"
                " layout; make the cache with DynamicCache(config=model.config)"
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


def check_logits_to_keep(value: Any) -> None:
    """Refuse what is neither a number of at least 0 nor a tensor of indices.

    Raises:
        ValueError: see above.
    """
    if isinstance(value, torch.Tensor):
        check_integers("logits_to_keep", value)
    elif not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise ValueError(
            f"logits_to_keep: expected an integer or a tensor of indices, {_got(value)}"
        )
    elif value < 0:
        raise ValueError(
            f"logits_to_keep: expected at least 0, got {value}; give the number of last tokens, or 0 for"
            " all"
        )


def check_count(name: str, value: Any) -> None:
    """Refuse a count of targets that is NaN, infinite or negative.

    Raises:
        ValueError: see above.
    """
    if value is None or torch.compiler.is_compiling():
        return
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            return
        wrong = value.numel() != 1 or not (torch.isfinite(value) & (value >= 0)).all()
    else:
        wrong = not isinstance(value, int | float) or not math.isfinite(value) or value < 0
    if wrong:
        raise ValueError(f"{name}: expected a number of targets, at least 0, got {value}")


def explain_index(
    error: Exception, name: str, values: torch.Tensor | None, size: int, ignored: int | None = None
) -> None:
    """Raise an error of a look-up anew, with the value and the vocabulary, where that is why.

    Args:
        error: what torch raised.
        name: of the input, `input_ids` or `labels`.
        values: integers that were looked up.
        size: how many there are to look up.
        ignored: a value that stands for none.

    Raises:
        OutOfVocabularyError: a value is out of bounds, as far as can be seen on the CPU.
    """
    if values is None or values.device.type != "cpu":
        return
    outside = values[((values < 0) | (values >= size)) & (values != ignored)]
    if not outside.numel():
        return
    also = "" if ignored is None else f", or {ignored} for none"
    raise OutOfVocabularyError(
        f"{name}: expected ids from 0 to {size - 1} (the model's vocab_size is {size}){also}, got"
        f" {outside[0].item()}, which is out of bounds; try the tokenizer of this model, or"
        " model.resize_token_embeddings"
    ) from error


def _got(value: Any) -> str:
    what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    return f"got {what}"
