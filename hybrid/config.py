"""HybridConfig: a layout string, what its letters mean, and the sizes around them."""

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedConfig

from hybrid import ffn as _ffn  # noqa: F401  (registers the feed-forwards)
from hybrid import mixers as _mixers  # noqa: F401  (registers the mixers)
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
from hybrid.norms import NormName
from hybrid.options import ConfigError, build, did_you_mean, type_problem
from hybrid.registry import Registry, feed_forwards, mixers

FULL = "full_attention"

# What other models' configs call our options.
OTHER_NAMES = {
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "rope_theta": "rope_parameters", "rope_scaling": "rope_parameters",
    "hidden_act": "activation", "attention_bias": "bias", "attention_dropout": "dropout",
}  # fmt: skip

# Stands in for a hidden_size that is itself a mistake: whatever head count is asked for divides it.
ANY_SIZE = 64 * 2**4 * 3**2 * 5 * 7 * 11 * 13

# Keys that config.json may hold beside the fields, all of them transformers' own.
STANDARD_KEYS = {
    "model_type", "auto_map", "torch_dtype", "name_or_path", "_name_or_path", "_commit_hash",
    "attn_implementation", "experts_implementation", "output_attentions", "num_labels",
    "quantization_config", "per_layer_config", "tie_last_hidden_states", "custom_pipelines",
}  # fmt: skip


class HybridConfig(PreTrainedConfig):
    """The configuration of a hybrid language model.

    Args:
        layout: the stack as a layout string, e.g. `LLLS` (see `hybrid.layout`).
        num_hidden_layers: depth; the layout cycles to fill it and must divide it. Default: the
            layout's own length.
        ffn: the feed-forward pattern laid after each mixer, cyclically (`-` dense); empty for none.
            A layout that names feed-forwards itself is taken literally and wants the default here.
        mixers: symbol -> options of its mixer. `type` names the mixer, and may be left out for
            symbols that have one by default: `{"S": {"num_heads": 8}, "Q": {"type":
            "softmax_attention", "rope_parameters": null}}`.
        feed_forwards: likewise for `-` and `E`.
        vocab_size, hidden_size: V and the model dim D.
        norm, norm_eps: `rmsnorm` or `layernorm`.
        norm_position: `pre`: x + f(norm(x)). `post`: norm(x + f(x)) (arXiv 1706.03762).
            `sandwich`: x + norm(f(norm(x))) (Gemma 2). `reordered`: x + norm(f(x)) (OLMo 2).
        init: `fixed`: std `initializer_range` everywhere. `depth_scaled`: as GPT-2, projections into
            the residual stream divided by sqrt(number of residual branches). `xavier`:
            Xavier-normal matrices (arXiv: Glorot and Bengio 2010), embeddings with the std.
        initializer_range: the std.
        parallel_combine: how mixers side by side in one layer are combined, `mean` or `sum`.
        max_position_embeddings: the longest sequence the model is meant for; null for no limit.
        tie_word_embeddings: share the embedding with the output head.
        use_cache: return a cache from forward.

    Raises:
        ConfigError: a ValueError with one line for every mistake in the arguments.
    """

    model_type = "hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    layout: str = "LLLS"
    num_hidden_layers: int | None = None
    ffn: str | None = "-"
    mixers: dict[str, dict] | None = None
    feed_forwards: dict[str, dict] | None = None
    norm: NormName = "rmsnorm"
    norm_eps: float = 1e-6
    norm_position: Literal["pre", "post", "sandwich", "reordered"] = "pre"
    init: Literal["fixed", "depth_scaled", "xavier"] = "depth_scaled"
    initializer_range: float = 0.02
    parallel_combine: Literal["mean", "sum"] = "mean"
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        mistakes = self._unknown_keys(kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key in _standard_keys()}
        mistakes += self._wrong_types()
        mistakes += self._wrong_sizes()
        mistakes += self._wrong_bindings("mixers", mixers)
        mistakes += self._wrong_bindings("feed_forwards", feed_forwards)
        mistakes += self._wrong_layout()
        if mistakes:
            raise ConfigError(mistakes, "the model config")
        self.num_hidden_layers = len(self.layers)
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: a checkpoint names this package, and carries no copy of its code."""

    def to_dict(self) -> dict[str, Any]:
        """As transformers', less the attributes that others attached: only keys that load again."""
        known = self._field_names() | _standard_keys()
        return {key: value for key, value in super().to_dict().items() if key in known}

    # What the rest of the package asks.

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The stack, layer by layer."""
        return _resolved(self.layout, self.ffn or "", self.num_hidden_layers)

    @property
    def layer_types(self) -> list[str]:
        """One of transformers' layer types for each layer; its caches and masks are made from them.

        A stack without keys has one layer of type `hybrid_sliding`, whose window stays empty: `generate`
        asks a cache how many tokens it has seen, and layers of states alone cannot answer.
        """
        kinds = {layer: self._layer_type(layer) for layer in set(self.layers)}
        types = [kinds[layer] for layer in self.layers]
        if self.counting_layer is not None:
            types[self.counting_layer] = "hybrid_sliding"
        return types

    @property
    def counting_layer(self) -> int | None:
        """The layer that counts tokens in the cache of a stack without keys; None where keys do."""
        kinds = {self._layer_type(layer) for layer in set(self.layers)}
        if kinds - {"linear_attention", "moe"}:
            return None
        return next(i for i, layer in enumerate(self.layers) if layer.mixers)

    @property
    def sliding_window(self) -> int:
        """For the layer that counts tokens: a window that never fills. No other stack has one."""
        if self.counting_layer is None:
            raise AttributeError("no layer of this stack has a sliding window")
        return 2

    @property
    def number_of_conv_states(self) -> int:
        """States that a layer of transformers' cache must hold: mixers with one, side by side."""
        return max(1, *(sum(map(self.uses_state, layer.mixers)) for layer in set(self.layers)))

    @property
    def num_residual_branches(self) -> int:
        """Sublayers that add to the residual stream."""
        return sum(bool(layer.mixers) + bool(layer.ffn) for layer in self.layers)

    def uses_state(self, symbol: str) -> bool:
        """Whether the mixer of a symbol keeps a recurrent or a convolution state."""
        cls, options = self.mixer(symbol)
        return cls.uses_state(options)

    def mixer(self, symbol: str) -> tuple[type, Any]:
        """The mixer class of a symbol, and its completed options."""
        return self._binding("mixers", mixers, symbol)

    def feed_forward(self, symbol: str) -> tuple[type, Any]:
        """The feed-forward class of a symbol, and its completed options."""
        return self._binding("feed_forwards", feed_forwards, symbol)

    # Names that tools around transformers expect, answered by the first mixer that has them.

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first softmax mixer, else of the first mixer that has heads."""
        return self._first_option("num_heads")

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the first softmax mixer, else of the first mixer that has heads."""
        return self._first_option("num_kv_heads", "num_heads")

    @property
    def head_dim(self) -> int:
        """Head dim of the first softmax mixer, else of the first mixer that has one."""
        return self._first_option("head_dim")

    def _first_option(self, *names: str) -> int:
        symbols = list(dict.fromkeys(s for layer in self.layers for s in layer.mixers))
        symbols.sort(key=lambda s: self.mixer(s)[0].layer_type == "linear_attention")
        for symbol in symbols:
            options = self.mixer(symbol)[1]
            for name in names:
                if getattr(options, name, None) is not None:
                    return getattr(options, name)
        raise AttributeError(f"no mixer of layout {self.layout!r} has the option {names[0]!r}")

    def _layer_type(self, layer: Layer) -> str:
        if not layer.mixers:
            return "moe"  # transformers' name for a layer without a mixer: nothing is cached
        kinds = [self.mixer(symbol)[0].layer_type for symbol in layer.mixers]
        softmax = [kind for kind in kinds if kind != "linear_attention"]
        if not softmax:
            return "linear_attention"
        return "hybrid" if any(map(self.uses_state, layer.mixers)) else softmax[0]

    def _class(self, field: str, registry: Registry, symbol: str) -> type:
        name = self._bound(field).get(symbol, {}).get("type")
        return registry.get(name or registry.symbols()[symbol])

    def _binding(self, field: str, registry: Registry, symbol: str) -> tuple[type, Any]:
        values = dict(self._bound(field).get(symbol, {}))
        values.pop("type", None)
        cls = self._class(field, registry, symbol)
        options = build(cls.Options, values, f"{field}.{symbol}", [])
        return cls, options.complete(self.hidden_size)

    # Validation: every mistake is a line, none hides another.

    def _field_names(self) -> set[str]:
        return {f.name for f in dataclasses.fields(self)}

    def _unknown_keys(self, kwargs: dict[str, Any]) -> list[str]:
        lines = []
        model_type = kwargs.get("model_type", self.model_type)
        if model_type != self.model_type:
            lines.append(f"model_type: this is {self.model_type!r}, found {model_type!r}")
        unknown = [key for key in kwargs if key not in _standard_keys()]
        return lines + [f"{key}: unknown key, {self._hint(key)}" for key in unknown]

    def _hint(self, key: str) -> str:
        """Where a key that is not the model's belongs: to a mixer or a feed-forward, by its options."""
        key = OTHER_NAMES.get(key, key)
        nested = {f"mixers: {{{s}: {{{o}: ...}}}}": o for s, o in self._options("mixers", mixers)}
        nested |= {
            f"feed_forwards: {{{s}: {{{o}: ...}}}}": o
            for s, o in self._options("feed_forwards", feed_forwards)
        }
        names = list(inspect.get_annotations(HybridConfig))
        near = difflib.get_close_matches(key, [*nested.values(), *names], n=1, cutoff=0.6)
        if near and near[0] not in names:
            return f"did you mean {next(path for path, o in nested.items() if o == near[0])}?"
        return did_you_mean(key, names)

    def _options(self, field: str, registry: Registry) -> Iterator[tuple[str, str]]:
        """Symbol and option, for every symbol that the layout seems to use; softmax's first."""
        text = f"{self.layout}{self.ffn}" if isinstance(self.layout, str) else ""
        names = registry.symbols() | {s: v.get("type") for s, v in self._bound(field).items()}
        known = {s: registry.get(n) for s, n in names.items() if n in registry.names()}
        used = sorted(set(known) & set(text), key=text.index)
        used.sort(key=lambda s: getattr(known[s], "layer_type", FULL) != FULL)
        for symbol in used:
            for f in dataclasses.fields(known[symbol].Options):
                yield symbol, f.name

    def _bound(self, field: str) -> dict[str, dict]:
        """What the config binds, as far as it is well-formed."""
        bindings = getattr(self, field)
        bindings = bindings if isinstance(bindings, dict) else {}
        return {s: v for s, v in bindings.items() if isinstance(s, str) and isinstance(v, dict)}

    def _wrong_types(self) -> list[str]:
        lines = []
        for name, hint in inspect.get_annotations(HybridConfig).items():
            if problem := type_problem(getattr(self, name), hint):
                lines.append(f"{name}: {problem}")
        if isinstance(self.dtype, str) and not _is_dtype(self.dtype):
            known = [name for name in vars(torch) if _is_dtype(name)]
            lines.append(f"dtype: unknown {self.dtype!r}, {did_you_mean(self.dtype, known)}")
        return lines

    def _wrong_sizes(self) -> list[str]:
        lines = []
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if _is_number(value) and value < 1:
                lines.append(f"{name}: must be at least 1, found {value}")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if _is_number(value) and not 0 < value < float("inf"):
                lines.append(f"{name}: must be greater than 0 and finite, found {value}")
        size = self.vocab_size if _is_number(self.vocab_size) else 0
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list) else [ids]:
                if _is_number(token) and size > 0 and not 0 <= token < size:
                    lines.append(f"{name}: {token} is outside the vocabulary of {size}")
        return lines

    def _wrong_bindings(self, field: str, registry: Registry) -> list[str]:
        lines: list[str] = []
        bindings = getattr(self, field)
        for symbol, values in (bindings if isinstance(bindings, dict) else {}).items():
            path = f"{field}.{symbol}"
            if not isinstance(values, dict):
                lines.append(f"{path}: expected a mapping of options, found {values!r}")
                continue
            try:
                self._check_symbol(symbol, registry)
                name = values.get("type") or registry.symbols().get(symbol)
                if not isinstance(name, str | None):
                    lines.append(f"{path}.type: expected str, found {type(name).__name__} {name!r}")
                    continue
                if name is None:
                    known = ", ".join(registry.names())
                    lines.append(f"{path}.type: required, for {symbol!r} has none; known: {known}")
                    continue
                cls = registry.get(name)
            except ValueError as error:
                lines.append(f"{path}: {error}")
                continue
            options = {key: value for key, value in values.items() if key != "type"}
            lines += self._wrong_options(cls, options, path)
        return lines

    def _wrong_options(self, cls: type, options: dict[str, Any], path: str) -> list[str]:
        """Mistakes in each option, and in how those that are right in themselves fit together."""
        lines: list[str] = []
        built = build(cls.Options, options, path, lines)
        if built is None:
            wrong = {line.removeprefix(f"{path}.").split(":")[0] for line in lines}
            right = {key: value for key, value in options.items() if key not in wrong}
            built = build(cls.Options, right, path, [])
        if built is None:
            return lines
        return lines + [f"{path}.{problem}" for problem in built.problems(self._sized())]

    def _sized(self) -> "HybridConfig":
        """This config, with a stand-in where hidden_size is a mistake."""
        if type(self.hidden_size) is int and self.hidden_size > 0:
            return self
        sized = copy.copy(self)
        sized.hidden_size = ANY_SIZE
        return sized

    def _wrong_layout(self) -> list[str]:
        if not isinstance(self.layout, str):
            return []
        depth = self.num_hidden_layers if _is_number(self.num_hidden_layers) else None
        ffn = self.ffn if isinstance(self.ffn, str) else ""
        lines: list[str] = []
        layers: tuple[Layer, ...] = ()
        try:
            check_bound(parse(self.layout), {*mixers.symbols(), *self._bound("mixers")} - set(FFN))
        except LayoutError as error:
            lines.append(str(error))
        try:
            layers = _resolved(self.layout, ffn, depth if depth and depth > 0 else None)
        except LayoutError as error:
            lines.append(str(error))
        try:
            parse_ffn(ffn)
        except LayoutError as error:
            lines.append(str(error))
        lines = list(dict.fromkeys(lines))  # what is wrong with one string may stop more than one
        if layers and not any(layer.mixers for layer in layers):
            lines.append(f"layout: {self.layout!r} has no mixer, so tokens would never meet")
        lines += self._unbound_feed_forwards(layers)
        return lines or self._defaults_that_do_not_fit(layers) + self._crowded(layers)

    def _unbound_feed_forwards(self, layers: Iterable[Layer]) -> list[str]:
        bound = set(feed_forwards.symbols()) | set(self._bound("feed_forwards"))
        return [
            f"ffn: {symbol!r} ({FFN[symbol]}) stands for no feed-forward yet; bound:"
            f" {', '.join(sorted(bound))}. Bind it in feed_forwards: {{{symbol}: ...}}"
            for symbol in dict.fromkeys(layer.ffn for layer in layers if layer.ffn)
            if symbol not in bound
        ]

    @staticmethod
    def _check_symbol(symbol: str, registry: Registry) -> None:
        if registry is mixers:
            check_symbol(symbol)
        elif symbol not in FFN:
            raise ValueError(f"{symbol!r} is no feed-forward symbol; they are {', '.join(FFN)}")

    def _defaults_that_do_not_fit(self, layers: Iterable[Layer]) -> list[str]:
        """Symbols used by the layout but not bound by the config, whose defaults clash with D."""
        if not isinstance(self.hidden_size, int) or self.hidden_size < 1:
            return []
        lines = []
        for symbol in dict.fromkeys(s for layer in layers for s in layer.mixers):
            if symbol not in self._bound("mixers"):
                options = mixers.get(mixers.symbols()[symbol]).Options()
                lines += [f"mixers.{symbol}.{problem}" for problem in options.problems(self)]
        return lines

    def _crowded(self, layers: Iterable[Layer]) -> list[str]:
        lines = []
        for layer in dict.fromkeys(layers):
            try:
                kinds = [self._class("mixers", mixers, s).layer_type for s in layer.mixers]
            except (ValueError, TypeError):
                continue  # a binding with a mistake of its own, reported already
            if len(kinds) - kinds.count("linear_attention") > 1:
                lines.append(
                    f"layout: [{''.join(layer.mixers)}] has two softmax mixers side by side, and a"
                    " layer's cache holds the keys and values of one; put them in two layers"
                )
        return lines


@lru_cache(maxsize=256)
def _resolved(layout: str, ffn: str, depth: int | None) -> tuple[Layer, ...]:
    return resolve(layout, ffn=ffn, num_hidden_layers=depth)


@lru_cache(maxsize=1)
def _standard_keys() -> frozenset[str]:
    generation = GenerationConfig._get_default_generation_params()
    return frozenset(STANDARD_KEYS | set(PreTrainedConfig().__dict__) | set(generation))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
