"""Measured prefill and decode speed by length."""

import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch

from .cost import kept_cache, prefill
from .scoring import Progress, check_length, device_of, evaluating


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def _decode(model, cache: Any, length: int, steps: int) -> float:
    """Return the time in seconds to decode ``steps`` tokens after ``length`` tokens."""
    device = device_of(model)
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    # transformers from 5.24 on calls it ``cache``
    taken = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"
    with evaluating(model):
        began = _now(device)
        for step in range(steps):
            place = torch.tensor([[length + step]], device=device)
            output = model(token, **{name: cache}, position_ids=place, use_cache=True)
            cache = kept_cache(output, model)
        return _now(device) - began


def evaluate_speed(
    model,
    *,
    lengths: Sequence[int] = (128, 256, 512),
    steps: int = 16,
    repeats: int = 3,
    progress: Progress | None = None,
    allow_longer: bool = False,
) -> dict[str, Any]:
    """Time one sequence: the median of ``repeats`` runs after one warm-up run.

    Args:
        model: a causal language model that takes ``cache`` or ``past_key_values``.
        lengths: tokens of the prefill.
        steps: tokens decoded after it.
        repeats: timed runs per length.
        progress: called with the number of lengths done and of all.
        allow_longer: permit lengths beyond ``max_position_embeddings``.

    Returns:
        "cells": per length prefill and decode tokens per second; device and threads.
    """
    check_length(model, max(lengths) + steps, allow_longer=allow_longer)
    device = device_of(model)
    cells = []
    for done, length in enumerate(lengths, 1):
        prefills, decodes = [], []
        for run in range(repeats + 1):
            began = _now(device)
            cache = prefill(model, length)
            middle = _now(device)
            seconds = _decode(model, cache, length, steps)
            if run:
                prefills.append(middle - began)
                decodes.append(seconds)
        cells.append(
            {
                "length": length,
                "prefill_tokens_per_second": length / sorted(prefills)[repeats // 2],
                "decode_tokens_per_second": steps / sorted(decodes)[repeats // 2],
            }
        )
        if progress is not None:
            progress(done, len(lengths))
    return {
        "decode_tokens_per_second": cells[-1]["decode_tokens_per_second"],
        "cells": cells,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
