"""Measured cache size in bytes of any causal language model.

Runs a prefill with ``use_cache=True`` at two lengths and counts every tensor of the cache. The
bytes of a cache layer are exactly fixed + per_token * tokens (a KV cache grows, a recurrent state
does not), so two lengths determine both; a third length is a check. A sliding window grows until it
is full and is constant from then on.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .scoring import device_of, evaluating, takes_logits_to_keep

_CACHE_FIELDS = ("cache", "past_key_values", "cache_params", "state", "mems")
# short enough for a laptop, and long enough to fill the state of a short convolution
_FIRST, _STEP = 32, 16


def cache_tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield every distinct tensor in a cache object, in no particular order."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list | tuple | set):
        children = list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
        children = list(vars(value).values())
    else:
        return
    for child in children:
        yield from cache_tensors(child, seen)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors of a cache, except scalars (counters)."""
    return sum(t.numel() * t.element_size() for t in cache_tensors(value) if t.dim() > 0)


@torch.inference_mode()
def prefill(model, tokens: int) -> Any:
    """Run a prefill of one row of ``tokens`` ids and return the cache.

    Raises:
        ValueError: the model returns no cache.
    """
    ids = torch.ones(1, tokens, dtype=torch.long, device=device_of(model))
    options = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    with evaluating(model):
        return kept_cache(model(ids, use_cache=True, **options), model)


def kept_cache(output: Any, model: torch.nn.Module) -> Any:
    """Return the cache in a model's output.

    Raises:
        ValueError: there is none.
    """
    for field in _CACHE_FIELDS:
        cache = getattr(output, field, None)
        if cache is not None:
            return cache
    looked_for = ", ".join(_CACHE_FIELDS)
    raise ValueError(f"{type(model).__name__}: expected {looked_for} in its output, got none")


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one cache layer: fixed + per_token * min(tokens, window)."""

    fixed: int
    per_token: int
    window: int | None = None

    def at(self, context: int) -> int:
        """Return the bytes of this layer after ``context`` tokens of one sequence."""
        tokens = context if self.window is None else min(context, self.window)
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class CacheCost:
    """Bytes of one sequence's cache, layer by layer."""

    layers: tuple[LayerCost, ...]

    @property
    def fixed(self) -> int:
        """Bytes independent of the length (recurrent and convolution states)."""
        return sum(layer.fixed for layer in self.layers)

    @property
    def per_token(self) -> int:
        """Bytes added by each token, without limit (sliding windows are not counted)."""
        return sum(layer.per_token for layer in self.layers if layer.window is None)

    @property
    def windows(self) -> tuple[int, ...]:
        """Distinct numbers of tokens in sliding-window layers, ascending."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window is not None}))

    def at(self, context: int) -> int:
        """Return the bytes after ``context`` tokens."""
        return sum(layer.at(context) for layer in self.layers)


def _layers(cache: Any) -> list[Any]:
    layers = getattr(cache, "layers", None)
    return list(layers) if layers else [cache]


def _window(layer: Any) -> int | None:
    """Return the number of tokens in a sliding-window cache layer (the window minus the new token)."""
    window = getattr(layer, "sliding_window", None)
    return window - 1 if getattr(layer, "is_sliding", False) and window else None


def measure_cache(model) -> CacheCost:
    """Measure the cache of any causal language model, for one sequence.

    Raises:
        ValueError: the model has no cache, or its size is not linear in the length.
    """
    shortest = min([w for w in map(_window, _layers(prefill(model, 2))) if w] or [1 << 30])
    # windows that are full at the shortest length are constant
    first = _FIRST if shortest > _FIRST + 2 * _STEP else max(_FIRST, shortest + 1)
    lengths = (first, first + _STEP, first + 2 * _STEP)
    caches = [_layers(prefill(model, tokens)) for tokens in lengths]
    costs = []
    for number, layers in enumerate(zip(*caches, strict=True)):
        sizes = [tensor_bytes(layer) for layer in layers]
        grown, rest = divmod(sizes[1] - sizes[0], _STEP)
        if rest or sizes[2] - sizes[1] != sizes[1] - sizes[0]:
            raise ValueError(
                f"cache layer {number} does not grow linearly: {sizes} bytes at {lengths} tokens"
            )
        window = _window(layers[0]) if grown else None
        costs.append(LayerCost(sizes[0] - grown * first, grown, window))
    return CacheCost(tuple(costs))


def parameter_counts(model) -> dict[str, int]:
    """Return the number of distinct parameters: total, in input and output embeddings, and others."""
    total = sum(p.numel() for p in model.parameters())
    embeddings = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        weight = getattr(module, "weight", None)
        if weight is not None:
            embeddings[id(weight)] = weight.numel()
    embedded = sum(embeddings.values())
    return {"total": total, "embedding": embedded, "non_embedding": total - embedded}


def evaluate_cost(model, *, context: int = 32768) -> dict[str, Any]:
    """Measure the cache of a model.

    Args:
        model: a causal language model.
        context: number of tokens for the reported size (extrapolated linearly, so it may exceed the
            trained length).

    Returns:
        cache_bytes (at ``context``), fixed_bytes, bytes_per_token, windows, parameters.
    """
    cost = measure_cache(model)
    return {
        "context": context,
        "cache_bytes": cost.at(context),
        "fixed_bytes": cost.fixed,
        "bytes_per_token": cost.per_token,
        "windows": list(cost.windows),
        "layers": [asdict(layer) for layer in cost.layers],
        "parameters": parameter_counts(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
