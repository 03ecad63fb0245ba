"""Keyword arguments of forward passes: each is used, ignored for a stated reason, or refused by name.

transformers' own models take `**kwargs` and drop what they do not know, so a typo, or a name that a
new version of transformers gives to an old thing, changes the result without a word. Here it raises.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hybrid.config.options import did_you_mean

_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}

CACHE = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
"""The name that the installed transformers gives to a cache: `cache` from 5.24 on."""

ATTENTION_ARGUMENTS = frozenset(
    {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""Passed on to the mixers, and by them to transformers' attention functions."""

MIXER_ARGUMENTS = ATTENTION_ARGUMENTS | {"paged"}
"""Those, and by a stack to its layers in continuous batching: what belongs to the paged cache."""

DOCUMENT_ARGUMENTS = frozenset({"seq_idx"})
"""Numbers of packed documents, as collators make them for Mamba's kernels."""

PAGED_ARGUMENTS = frozenset(
    {
        "read_index",
        "write_index",
        "block_table",
        "is_causal",
        "logits_indices",
        "logits_processor_args",
        # max_length_q and max_length_k before transformers 5.24
        "max_seqlen_q",
        "max_seqlen_k",
    }
)
"""What continuous batching hands over beside its paged cache, for its attention functions."""

RECORDING_ARGUMENTS = frozenset(
    {"output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Read by transformers' `capture_outputs`, which wraps `HybridModel.forward`."""

LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels", "label_smoothing"})
"""Used by the loss of `HybridForCausalLM`.

`label_smoothing` is no parameter of `forward`: transformers' Trainer takes each parameter with "label"
in its name for a column of labels.
"""

IGNORED_ARGUMENTS = {
    "token_type_ids": "tokenizers made for encoders return them, generate and PEFT hand them on;"
    " all tokens are of one type here",
    "cache_position": "exporters and PEFT hand it over; the cache knows its length",
    "num_items_in_batch": "transformers' Trainer hands it to every model; the classification models"
    " pass it on to the stack, which has no loss",
    "return_dict": "read by transformers' decorators before forward",
}
"""What callers hand over and a stack may ignore, and why."""


def check_arguments(
    owner: str,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    known: Collection[str],
) -> None:
    """Refuse keyword arguments that `forward` would otherwise swallow.

    Args:
        owner: class name, for the message.
        forward: whose named parameters a misspelt name is compared with.
        kwargs: what arrived in its `**kwargs`.
        known: names among them that are used or rightly ignored.

    Raises:
        TypeError: an unknown name.
        ValueError: `is_causal=False`.
    """
    for name in kwargs:
        if name in known:
            continue
        if name == "is_causal":
            if kwargs[name] is False:
                raise ValueError(
                    f"{owner}: is_causal=False asks for attention in both directions, and the layers"
                    " of a hybrid model are causal; leave it out"
                )
            continue
        raise TypeError(_unexpected(owner, forward, name, known))


def pick_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, under whichever of transformers' two names it came."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give the cache once, as `cache` or as `past_key_values`, not as both")
    return past_key_values if cache is None else cache


def _unexpected(owner: str, forward: Callable[..., Any], name: str, known: Collection[str]) -> str:
    parameters = inspect.signature(forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    near = did_you_mean(name, [*named, *sorted(known)])
    return f"{owner}.forward got an unexpected keyword argument {name!r}; {near}"
