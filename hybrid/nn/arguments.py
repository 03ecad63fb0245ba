"""Checks of keyword arguments of forward passes: each is used, ignored for a reason, or an error.

transformers' own models accept ``**kwargs`` and drop unknown names. A typo, or a name changed by a new
version of transformers, then silently changes the result. Here it raises an error.
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
"""Name of the cache argument in the installed transformers: ``cache`` from 5.24 on."""

ATTENTION_ARGUMENTS = frozenset(
    {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
)
"""Arguments passed to mixers, and by them to transformers' attention functions."""

MIXER_ARGUMENTS = ATTENTION_ARGUMENTS | {"paged"}
"""Arguments of mixers: attention arguments, and the paged cache's in continuous batching."""

DOCUMENT_ARGUMENTS = frozenset({"seq_idx"})
"""Indices of packed documents, as collators create them for Mamba's kernels."""

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
"""Arguments of continuous batching besides its paged cache, for its attention functions."""

RECORDING_ARGUMENTS = frozenset(
    {"output_attentions", "output_hidden_states", "output_router_logits"}
)
"""Arguments read by transformers' ``capture_outputs``, which wraps ``HybridModel.forward``."""

LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels", "label_smoothing"})
"""Arguments of the loss of ``HybridForCausalLM``.

``label_smoothing`` is not a parameter of ``forward``, because transformers' Trainer treats each
parameter with "label" in its name as a column of labels.
"""

IGNORED_ARGUMENTS = {
    "token_type_ids": "tokenizers of encoders return them, and generate and PEFT pass them on; all"
    " tokens have one type here",
    "cache_position": "exporters and PEFT pass it; the cache stores its own length",
    "num_items_in_batch": "transformers' Trainer passes it to every model; the classification models"
    " pass it to the stack, which has no loss",
    "return_dict": "read by transformers' decorators before forward",
}
"""Arguments that callers pass and a stack ignores, with the reason."""


def check_arguments(
    owner: str,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    known: Collection[str],
) -> None:
    """Raise an error for keyword arguments that ``forward`` does not know.

    Args:
        owner: class name, for the message.
        forward: method whose named parameters are suggested for a misspelt name.
        kwargs: its ``**kwargs``.
        known: names that are used or ignored for a reason.

    Raises:
        TypeError: unknown name.
        ValueError: ``is_causal=False``.
    """
    for name in kwargs:
        if name in known:
            continue
        if name == "is_causal":
            if kwargs[name] is False:
                raise ValueError(
                    "is_causal: expected True or no value, as the layers of a hybrid model are causal,"
                    f" got False in {owner}.forward; try without it"
                )
            continue
        raise TypeError(_unexpected(owner, forward, name, known))


def pick_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache, passed under either of transformers' two names.

    Raises:
        ValueError: both are set.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "cache: expected one of cache and past_key_values, got both; try cache alone"
        )
    return past_key_values if cache is None else cache


def _unexpected(owner: str, forward: Callable[..., Any], name: str, known: Collection[str]) -> str:
    parameters = inspect.signature(forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    near = did_you_mean(name, [*named, *sorted(known)])
    return f"{owner}.forward got an unexpected keyword argument {name!r}; {near}"
