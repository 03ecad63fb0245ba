"""Validation of a config; reports all mistakes, one line of text for each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from hybrid.config import block_validation, lookup, loss_validation
from hybrid.config.declare import build, check_keys, show
from hybrid.config.fields import ConfigFields
from hybrid.config.options import did_you_mean, nearest
from hybrid.config.registry import Registry, feed_forwards, mixers
from hybrid.config.sizes import Sizes
from hybrid.layout import (
    FFN,
    Layer,
    LayoutError,
    check_bound,
    check_symbol,
    parse,
    parse_ffn,
    resolve,
)

FULL = "full_attention"

# Names of our options in the configs of other models.
OTHER_NAMES = {
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "rope_theta": "rope_parameters", "rope_scaling": "rope_parameters",
    "num_layer": "num_hidden_layers", "num_layers": "num_hidden_layers",
    "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers",
    "d_model": "hidden_size", "n_embd": "hidden_size",
    "hidden_act": "activation", "attention_bias": "bias", "attention_dropout": "dropout",
}  # fmt: skip

# Replaces an invalid hidden_size while other options are checked; divisible by any head count.
ANY_SIZE = 64 * 2**4 * 3**2 * 5 * 7 * 11 * 13

DEEPEST, WIDEST = 1 << 14, 1 << 20
"""Maximum number of layers, and of channels."""

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

# Keys of transformers that config.json may contain in addition to the fields.
STANDARD_KEYS = {
    "model_type", "auto_map", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash",
    "attn_implementation", "experts_implementation", "output_attentions", "num_labels",
    "quantization_config", "per_layer_config", "tie_last_hidden_states", "custom_pipelines",
}  # fmt: skip


def find_mistakes(
    config: ConfigFields, hints: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[list[str], tuple[Layer, ...]]:
    """Return the mistakes of a config, and its layers.

    Args:
        config: config with its arguments as passed.
        hints: fields of the config and their types.
        kwargs: arguments that are not fields.

    Returns:
        A line for each mistake, and the layers of the layout; () if there are mistakes.
    """
    lines = _unknown_keys(config, kwargs, list(hints))
    lines += check_keys(type(config), hints, {name: getattr(config, name) for name in hints})[0]
    lines += _wrong_dtype(config) + tokens_outside(config)
    lines += _wrong_bindings(config, "mixers", mixers)
    lines += _wrong_bindings(config, "feed_forwards", feed_forwards)
    wrong, layers = _lay_out(config)
    lines += wrong
    lines += block_validation.find_mistakes(config, () if lines else layers)
    lines += loss_validation.find_mistakes(config, () if lines else layers)
    return lines, () if lines else layers


@lru_cache(maxsize=1)
def standard_keys() -> frozenset[str]:
    """Return the keys of config.json that transformers defines."""
    generation = GenerationConfig._get_default_generation_params()
    return frozenset(STANDARD_KEYS | set(PreTrainedConfig().__dict__) | set(generation))


def _unknown_keys(config: ConfigFields, kwargs: Mapping[str, Any], names: list[str]) -> list[str]:
    lines = []
    model_type = kwargs.get("model_type", config.model_type)
    if model_type != config.model_type:
        lines.append(f"model_type: expected {config.model_type!r}, got {model_type!r}")
    unknown = [key for key in kwargs if key not in standard_keys()]
    return lines + [f"{key}: unknown key, {_hint(config, key, names)}" for key in unknown]


def _hint(config: ConfigFields, key: str, names: list[str]) -> str:
    """Return a suggestion for an unknown key: a field, or an option of a mixer or feed-forward."""
    key = OTHER_NAMES.get(key, key)
    nested = {f"mixers: {{{s}: {{{o}: ...}}}}": o for s, o in _options(config, "mixers", mixers)}
    nested |= {
        f"feed_forwards: {{{s}: {{{o}: ...}}}}": o
        for s, o in _options(config, "feed_forwards", feed_forwards)
    }
    near = nearest(key, {*nested.values(), *names})
    if near is not None and near not in names:
        return f"did you mean {next(path for path, o in nested.items() if o == near)}?"
    return did_you_mean(key, names)


def _options(config: ConfigFields, field: str, registry: Registry) -> Iterator[tuple[str, str]]:
    """Yield symbol and option of every symbol that the layout seems to use; softmax first."""
    patterns = config.ffn.values() if isinstance(config.ffn, dict) else [config.ffn]
    text = "".join(map(str, (config.layout, *patterns))) if isinstance(config.layout, str) else ""
    names = registry.symbols() | {
        s: v.get("type") for s, v in lookup.bindings(config, field).items()
    }
    known = {s: registry.get(n) for s, n in names.items() if n in registry.names()}
    used = sorted(set(known) & set(text), key=text.index)
    used.sort(key=lambda s: getattr(known[s], "layer_type", FULL) != FULL)
    for symbol in used:
        for f in dataclasses.fields(known[symbol].Options):
            yield symbol, f.name


def _wrong_dtype(config: ConfigFields) -> list[str]:
    lines = []
    if isinstance(config.dtype, str) and not _is_dtype(config.dtype):
        known = [name for name in vars(torch) if _is_dtype(name)]
        near = did_you_mean(config.dtype, known)
        lines.append(f"dtype: expected a floating-point dtype, got {config.dtype!r}, {near}")
    if isinstance(config.dtype, torch.dtype) and not config.dtype.is_floating_point:
        lines.append(f"dtype: expected a floating-point dtype, got {config.dtype}")
    return lines


def tokens_outside(config: ConfigFields) -> list[str]:
    """Return a line for each special token that the vocabulary does not have."""
    size = config.vocab_size if _is_int(config.vocab_size) else 0
    lines = []
    for name in TOKEN_IDS:
        ids = getattr(config, name)
        for token in ids if isinstance(ids, list) else [ids]:
            if _is_int(token) and 0 < size <= token:
                lines.append(f"{name}: expected an id below vocab_size {size}, got {token}")
    return lines


def _wrong_bindings(config: ConfigFields, field: str, registry: Registry) -> list[str]:
    lines: list[str] = []
    bindings = getattr(config, field)
    for symbol, values in (bindings if isinstance(bindings, dict) else {}).items():
        path = f"{field}.{symbol}"
        if not (isinstance(symbol, str) and isinstance(values, dict)):
            continue
        try:
            _check_symbol(symbol, registry)
            name = values.get("type") or registry.symbols().get(symbol)
            if not isinstance(name, str | None):
                lines.append(f"{path}.type: expected str, got {show(name)}")
                continue
            if name is None:
                known = ", ".join(registry.names())
                lines.append(
                    f"{path}.type: expected the name of a mixer or feed-forward, since {symbol!r}"
                    f" has no default, got none; known: {known}"
                )
                continue
            cls = registry.get(name)
        except ValueError as error:
            lines.append(f"{path}: {error}")
            continue
        options = {key: value for key, value in values.items() if key != "type"}
        lines += _wrong_options(config, cls, options, path)
    return lines


def _wrong_options(
    config: ConfigFields, cls: type, options: dict[str, Any], path: str
) -> list[str]:
    """Report mistakes in each option, and in combinations of valid options."""
    lines: list[str] = []
    built = build(cls.Options, options, path, lines)
    if built is None:
        wrong = {re.split(r"[:.\[]", line.removeprefix(f"{path}."))[0] for line in lines}
        right = {key: value for key, value in options.items() if key not in wrong}
        built = build(cls.Options, right, path, [])
    if built is None:
        return lines
    sizes = _sizes(config, path)
    problems = built.problems(sizes or Sizes(ANY_SIZE))
    if sizes is None:  # defaults derived from the placeholder size are not the user's mistakes
        problems = [line for line in problems if re.split("[:.]", line)[0] in options]
    return lines + [f"{path}.{problem}" for problem in problems]


def _sizes(config: ConfigFields, path: str) -> Sizes | None:
    """Return the sizes to check a mixer or feed-forward with; None if hidden_size is invalid."""
    size = config.hidden_size
    if not _is_int(size) or not 0 < size <= WIDEST:
        return None
    if path.startswith("mixers."):
        shared = config.shared if isinstance(config.shared, dict) else {}
        values = shared.get(path.removeprefix("mixers."))
        if isinstance(values, dict) and values.get("concat_embeddings") is True:
            size *= 2
    return Sizes(size, max_position_embeddings=config.max_position_embeddings)


def _lay_out(config: ConfigFields) -> tuple[list[str], tuple[Layer, ...]]:
    """Parse the layout; return its mistakes and its layers."""
    if not isinstance(config.layout, str):
        return [], ()
    depth = config.num_hidden_layers
    depth = depth if _is_int(depth) and 0 < depth <= DEEPEST else None
    ffn = config.ffn if isinstance(config.ffn, (str, dict)) else ""
    lines: list[str] = []
    layers: tuple[Layer, ...] = ()
    try:
        layout = parse(config.layout)
    except LayoutError as error:
        lines.append(_told(error))
    else:
        bound = {*mixers.symbols(), *lookup.bindings(config, "mixers")} - set(FFN)
        try:
            check_bound(layout, bound)
        except LayoutError as error:
            lines.append(_told(error))
        try:
            layers = resolve(layout, ffn, depth)
        except LayoutError as error:
            lines.append(_told(error))
    for pattern in ffn.values() if isinstance(ffn, dict) else [ffn]:
        try:
            parse_ffn(pattern)
        except LayoutError as error:
            lines.append(_told(error))
    lines = list(dict.fromkeys(lines))  # one mistake may be reported by several functions
    if layers and not any(layer.mixers for layer in layers):
        lines.append(f"layout: expected at least one mixer, got {config.layout!r}")
    lines += _unbound_feed_forwards(config, layers)
    lines = lines or _defaults_that_do_not_fit(config, layers) + _crowded(config, layers)
    return lines, layers


def _told(error: LayoutError) -> str:
    return str(error) if error.name in ("layout", "ffn") else f"ffn: {error}"


def _unbound_feed_forwards(config: ConfigFields, layers: Iterable[Layer]) -> list[str]:
    known = set(feed_forwards.symbols()) | set(lookup.bindings(config, "feed_forwards"))
    return [
        f"ffn: expected one of the bound symbols {', '.join(sorted(known))}, got {symbol!r}"
        f" ({FFN[symbol]}); try feed_forwards: {{{symbol}: ...}}"
        for symbol in dict.fromkeys(layer.ffn for layer in layers if layer.ffn)
        if symbol not in known
    ]


def _check_symbol(symbol: str, registry: Registry) -> None:
    if registry is mixers:
        check_symbol(symbol)
    elif symbol not in FFN:
        raise ValueError(f"expected a feed-forward symbol ({', '.join(FFN)}), got {symbol!r}")


def _defaults_that_do_not_fit(config: ConfigFields, layers: Iterable[Layer]) -> list[str]:
    """Report unbound symbols of the layout whose default options do not fit D."""
    lines = []
    for symbol in dict.fromkeys(s for layer in layers for s in layer.mixers):
        if symbol not in lookup.bindings(config, "mixers"):
            options, path = mixers.get(mixers.symbols()[symbol]).Options(), f"mixers.{symbol}"
            sizes = _sizes(config, path)
            problems = options.problems(sizes) if sizes else []
            lines += [f"{path}.{problem}" for problem in problems]
    return lines


def _crowded(config: ConfigFields, layers: Iterable[Layer]) -> list[str]:
    lines = []
    for layer in dict.fromkeys(layers):
        try:
            kinds = [
                lookup.bound_class(config, "mixers", mixers, s).layer_type for s in layer.mixers
            ]
        except (ValueError, TypeError):
            continue  # an invalid binding, already reported
        if kinds.count("full_attention") > 1:
            lines.append(
                f"layout: expected at most one softmax mixer in a layer, whose cache holds one set"
                f" of keys and values, got [{''.join(layer.mixers)}]; try two layers"
            )
    return lines


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dtype(name: str) -> bool:
    found = getattr(torch, name.removeprefix("torch."), None)
    return isinstance(found, torch.dtype) and found.is_floating_point
