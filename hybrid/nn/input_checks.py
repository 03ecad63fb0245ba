"""Checks of the inputs of a forward pass, with errors that name the input.

No check synchronises a device: values are read only on the CPU, or after an operation has failed.

Shapes: B batch, T time, D model dim.
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
    """Error for a token id or label outside the vocabulary."""


def check_tokens(ids: Any, embeddings: Any, width: int) -> None:
    """Check that token ids are (B, T) integers, or that embeddings are (B, T, D) floats.

    Raises:
        ValueError: both or neither are set, or the shape or dtype is wrong.
    """
    if (ids is None) == (embeddings is None):
        number = "neither" if ids is None else "both"
        raise ValueError(
            f"input_ids: expected exactly one of input_ids and inputs_embeds, got {number}"
        )
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
        raise ValueError(
            f"{name}: expected {expected} with at least one token, got {shape}; try"
            " leaving out empty batches, or a prompt with a first token such as bos_token_id"
        )


def check_cache(cache: Any, layer_types: Sequence[str]) -> None:
    """Check that a value is a transformers cache that fits the model's depth and layout.

    Args:
        cache: value to check. Cache layers of this package store their type as ``layer_type``.
        layer_types: layer types of the model.

    Raises:
        ValueError: another type, too many layers, or layers of another layout.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache: expected a Cache of transformers, got {type(cache).__name__}; try"
            " DynamicCache(config=model.config)"
        )
    layers = len(layer_types)
    if len(cache.layers) > layers:
        raise ValueError(
            f"cache: expected one of a model of {layers} layers, got {len(cache.layers)} layers; try"
            " DynamicCache(config=model.config)"
        )
    for number, (layer, expected) in enumerate(zip(cache.layers, layer_types, strict=False)):
        actual = getattr(layer, "layer_type", expected)
        if actual != expected:
            raise ValueError(
                f"cache.layers[{number}]: expected one for {expected}, got one for {actual}, as of"
                " another layout; try DynamicCache(config=model.config)"
            )


def check_room(cache: Any, past: int | torch.Tensor, time: int) -> None:
    """Check that a cache of fixed length has room for the next tokens.

    Not checked in a compiled forward, nor where reading the length would synchronise the device.

    Args:
        cache: transformers cache, or None.
        past: number of tokens in the cache.
        time: number of tokens to come.

    Raises:
        ValueError: there are more tokens than columns of keys.
    """
    if torch.compiler.is_compiling() or (isinstance(past, torch.Tensor) and past.is_cuda):
        return
    layers = () if cache is None else cache.layers
    limits = (x.max_cache_len for x in layers if hasattr(x, "max_cache_len") and not x.is_sliding)
    limit = next(limits, None)
    if limit is not None and int(past) + time > limit:
        raise ValueError(
            f"cache: expected at most {limit} tokens in a static cache, got {int(past)} + {time}; try a"
            " larger max_cache_len, or DynamicCache(config=model.config)"
        )


def check_masks(
    masks: Mapping[Any, Any],
    batch: int,
    time: int,
    needed: tuple[str, ...],
    local: tuple[str, ...] = (),
) -> None:
    """Check that masks by layer type have all types, only known types, and the right shapes.

    Args:
        masks: "linear_attention" (B, at least T), and "full_attention" in the format of the attention
            function, (B or 1, H or 1, T, at least T) or (B, at least T); None for no mask.
        batch, time: B and T.
        needed: layer types of the model.
        local: layer types whose entry the model creates itself; not checked.

    Raises:
        ValueError: a missing or unknown layer type, or a wrong type or shape.
    """
    known = ("full_attention", "linear_attention")
    for name in masks:
        if name not in known and name not in local:
            near = did_you_mean(str(name), known)
            raise ValueError(f"attention_mask: expected layer types {known}, got {name!r}; {near}")
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
    """Check that labels are (B, T) integers.

    Raises:
        ValueError: wrong dtype or shape.
    """
    for name, value in (("labels", labels), ("shift_labels", shift_labels)):
        if value is None:
            continue
        check_integers(name, value)
        if tuple(value.shape) != (batch, time):
            raise ValueError(f"{name}: expected ({batch}, {time}), got {tuple(value.shape)}")


def check_logits_to_keep(value: Any) -> None:
    """Check that a value is an integer of at least 0 or a tensor of indices.

    Raises:
        ValueError: another type, or a negative number.
    """
    if isinstance(value, torch.Tensor):
        check_integers("logits_to_keep", value)
    elif not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise ValueError(
            f"logits_to_keep: expected an integer or a tensor of indices, {_got(value)}"
        )
    elif value < 0:
        raise ValueError(
            f"logits_to_keep: expected at least 0, got {value}; try the number of last tokens, or 0 for"
            " all"
        )


def check_count(name: str, value: Any) -> None:
    """Check that a count of targets is finite and not negative.

    Raises:
        ValueError: NaN, infinite or negative.
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
    """Replace torch's indexing error by one with the id and the vocabulary size, if that is the cause.

    Args:
        error: error raised by torch.
        name: name of the input, ``input_ids`` or ``labels``.
        values: integers used as indices.
        size: vocabulary size.
        ignored: value that stands for no id.

    Raises:
        OutOfVocabularyError: a value on the CPU is out of bounds.
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
    kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    return f"got {kind}"
