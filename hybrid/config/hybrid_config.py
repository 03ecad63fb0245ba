"""HybridConfig: a layout string, what its letters mean, and the sizes around them."""

import dataclasses
import inspect
from typing import Any, Literal

from transformers import PreTrainedConfig

from hybrid import ffn as _ffn  # noqa: F401  (registers the feed-forwards)
from hybrid import mixers as _mixers  # noqa: F401  (registers the mixers)
from hybrid.config.block_options import NormPosition, ResidualOptions, SharedOptions, pick
from hybrid.config.options import ConfigError, build
from hybrid.config.registry import Registry, feed_forwards, mixers
from hybrid.config.validation import bound, bound_class, find_mistakes, resolved, standard_keys
from hybrid.layout import Layer
from hybrid.modeling.losses import LossBackend
from hybrid.modeling.mup import attention_scale, width_ratio
from hybrid.nn.norms import NormName

UNLIMITED = 2**31 - 1
"""The context length of a model that has none, where a number is asked for."""

DERIVED = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""Sizes that others read by transformers' names, and that no config is built from."""


class Values(dict[str, Any]):
    """The keys of a config, which answers for derived sizes, too, without having them as keys.

    So a copy with overrides, or a file, holds nothing that another key would contradict.
    """

    def __init__(self, values: dict[str, Any], derived: dict[str, Any]) -> None:
        super().__init__(values)
        self.derived = derived

    def __missing__(self, key: str) -> Any:
        return self.derived[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.derived

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or a derived size."""
        return super().get(key, self.derived.get(key, default))


class HybridConfig(PreTrainedConfig):
    """The configuration of a hybrid language model.

    Args:
        layout: the stack as a layout string, e.g. `LLLS` (see `hybrid.layout`).
        num_hidden_layers: depth; the layout cycles to fill it and must divide it. Default: the
            layout's own length.
        ffn: the feed-forward pattern laid after each mixer, cyclically (`-` dense); empty for none.
            Or one by symbol, laid after the layers of that symbol: `{"S": "E", "default": "-"}`.
            A layout that names feed-forwards itself is taken literally and wants the default here.
        mixers: symbol -> options of its mixer. `type` names the mixer, and may be left out for
            symbols that have one by default: `{"S": {"num_heads": 8}, "Q": {"type":
            "softmax_attention", "rope_parameters": null}}`.
        feed_forwards: likewise for `-` and `E`.
        vocab_size, hidden_size: V and the model dim D.
        norm, norm_eps: `rmsnorm`, `layernorm`, `zero_centered_rmsnorm` (Gemma, Qwen3-Next), or
            `weightless_rmsnorm`; see `hybrid.nn.norms`.
        norm_position: `pre`: x + f(norm(x)). `post`: norm(x + f(x)) (arXiv 1706.03762).
            `sandwich`: x + norm(f(norm(x))) (Gemma 2). `reordered`: x + norm(f(x)) (OLMo 2).
            `normed`: n + f(n), n = norm(x) (MiniMax-01, arXiv 2501.08313). Or by symbol (see
            `hybrid.config.block_options`): `{"S": "reordered", "default": "pre"}` (OLMo Hybrid).
        residuals: symbol -> multipliers of its residual branches, `input_multiplier`,
            `output_multiplier` and `skip_multiplier` (`block_options.ResidualOptions`;
            Granite, Falcon-H1, MiniMax-01): `{"default": {"output_multiplier": 0.22}}`.
        embedding_multiplier: of the embeddings of ids (Granite, Falcon-H1); `sqrt_hidden_size`:
            sqrt(D), rounded to the precision of the weights (Gemma, arXiv 2403.08295). Embeddings
            that are given as such are taken as they are.
        embedding_norm: a norm, of the kind `norm`, on what enters the stack (RWKV).
        logits_multiplier: of the logits (Falcon-H1's `lm_head_multiplier`, Granite's 1 /
            `logits_scaling`).
        init: `fixed`: std `initializer_range` everywhere. `depth_scaled`: as GPT-2, projections into
            the residual stream divided by sqrt(number of residual branches). `xavier`:
            Xavier-normal matrices (Glorot and Bengio 2010), embeddings with the std. `deepnorm`
            (arXiv 2203.00555): likewise, and with M residual branches, values, outputs and
            feed-forwards times (4 M)^(-1/4), and M^(1/4) the skip multiplier where `residuals` names
            none; with norm_position `post` or `normed`.
        initializer_range: the std.
        parallel_combine: how mixers side by side in one layer are combined: `mean`, `sum`, `concat`,
            `learned` or `learned_scalar`; see `hybrid.modeling.layer.ParallelMixers`.
        canon: positions of canon layers, short causal convolutions with a residual, as `ACD` or a
            list, or by symbol (see `hybrid.modeling.canon`); null for none. `B` makes the convolution of
            the mixers of that symbol one.
        canon_width: width of canon layers.
        shared: symbol -> how its layers share their weights: `blocks`, `lora_rank`, ... (see
            `hybrid.config.block_options.SharedOptions`; Zamba2).
        z_loss: lambda of lambda log^2 Z, added to the loss in training, Z the sum of a token's
            exponentiated logits (PaLM, arXiv 2204.02311: 0.0001; OLMo 2: 0.00001).
        logit_softcap: c of logits c tanh(logits / c), null for none (Gemma 2, arXiv 2408.00118: 30).
        loss_backend: how the loss is taken from hidden states: `chunked`, `liger` or `full`; see
            `hybrid.modeling.losses`.
        num_mtp_layers: multi-token prediction modules (arXiv 2412.19437, section 2.2); see
            `hybrid.modeling.mtp`.
        mtp_layout: the layers of each, a layout; null: of the kind of the last layer.
        mtp_loss_weight: of the mean of their losses (0.3, then 0.1, in DeepSeek-V3).
        mup_base_width: hidden_size that initialisation and learning rates were tuned at, from which
            they are scaled (muP, arXiv 2203.03466; see `hybrid.modeling.mup`); null: as they are.
        max_position_embeddings: the longest sequence the model is meant for; null for no limit.
        tie_word_embeddings: share the embedding with the output head.
        use_cache: return a cache from forward.
        imported_from: the published family that the model was imported from, by its `model_type`;
            `hybrid export` without `--as` goes back to it where it still fits.

    Raises:
        ConfigError: a ValueError with one line for every mistake in the arguments.
    """

    model_type = "hybrid"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    layout: str = "LLLS"
    num_hidden_layers: int | None = None
    ffn: str | dict[str, str] | None = "-"
    mixers: dict[str, dict] | None = None
    feed_forwards: dict[str, dict] | None = None
    norm: NormName = "rmsnorm"
    norm_eps: float = 1e-6
    norm_position: NormPosition | dict[str, NormPosition] = "pre"
    residuals: dict[str, dict] | None = None
    embedding_multiplier: float | Literal["sqrt_hidden_size"] = 1.0
    embedding_norm: bool = False
    logits_multiplier: float = 1.0
    init: Literal["fixed", "depth_scaled", "xavier", "deepnorm"] = "depth_scaled"
    initializer_range: float = 0.02
    parallel_combine: Literal["mean", "sum", "concat", "learned", "learned_scalar"] = "mean"
    canon: str | list[str] | dict[str, str] | None = None
    canon_width: int = 4
    shared: dict[str, dict] | None = None
    z_loss: float = 0.0
    logit_softcap: float | None = None
    loss_backend: LossBackend = "chunked"
    num_mtp_layers: int = 0
    mtp_layout: str | None = None
    mtp_loss_weight: float = 0.3
    mup_base_width: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    imported_from: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        hints = inspect.get_annotations(HybridConfig)
        mistakes = find_mistakes(self, hints, kwargs)
        if mistakes:
            raise ConfigError(mistakes, "the model config")
        self.num_hidden_layers = len(self.layers)
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: a checkpoint names this package, and carries no copy of its code."""

    def to_dict(self) -> dict[str, Any]:
        """As transformers', less the attributes that others attached: only keys that load again.

        PEFT looks up sizes in this dict that follow from the mixers, and it answers; see `Values`.
        """
        known = {f.name for f in dataclasses.fields(self)} | standard_keys()
        values = {key: value for key, value in super().to_dict().items() if key in known}
        return Values(values, {name: getattr(self, name) for name in DERIVED})

    # What the rest of the package asks.

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The stack, layer by layer."""
        return resolved(self.layout, self.ffn, self.num_hidden_layers)

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
            raise AttributeError("no layer of this stack has a sliding window for all layers")
        return 2

    @sliding_window.setter
    def sliding_window(self, value: int | None) -> None:
        """Accept what changes nothing: any value where no layer has keys, None elsewhere."""
        if value is not None and self.counting_layer is None:
            raise ValueError(
                f"sliding_window: a hybrid model has a window per symbol, got {value} for all; try"
                " a symbol of type 'sliding_window_attention' with mixers.SYMBOL.window"
            )

    @property
    def number_of_conv_states(self) -> int:
        """States that a layer of transformers' cache must hold, of mixers and of canon layers."""
        return max(1, *map(self.states_of, set(self.layers)))

    @property
    def num_residual_branches(self) -> int:
        """Sublayers that add to the residual stream."""
        return sum(bool(layer.mixers) + bool(layer.ffn) for layer in self.layers)

    @property
    def deepnorm_alpha(self) -> float:
        """The skip multiplier of DeepNorm for a decoder: (2 N)^(1/4), N layers of two branches."""
        return self.num_residual_branches**0.25

    @property
    def deepnorm_beta(self) -> float:
        """The gain of its initialisation: (8 N)^(-1/4)."""
        return (4 * self.num_residual_branches) ** -0.25

    def norm_position_at(self, *symbols: str) -> str:
        """Where the norms of a residual branch are, for the first of its symbols that is named."""
        return pick(self.norm_position, symbols, "pre")

    def residual_at(self, *symbols: str) -> ResidualOptions:
        """The multipliers of a residual branch, likewise."""
        options = ResidualOptions(**pick(self.residuals, symbols, {}))
        if options.skip_multiplier is not None:
            return options
        skip = self.deepnorm_alpha if self.init == "deepnorm" else 1.0
        return dataclasses.replace(options, skip_multiplier=skip)

    @property
    def ends_normed(self) -> bool:
        """Whether the last branch leaves the stream normalised, so that the head needs no norm."""
        last = self.layers[-1]
        symbols = (last.ffn, *last.mixers) if last.ffn else last.mixers
        return self.norm_position_at(*symbols) == "post"

    def canon_at(self, *symbols: str) -> str:
        """The positions of canon layers, for the first of the symbols that is named."""
        return "".join(sorted(pick(self.canon, symbols, "")))

    def canon_of(self, layer: Layer) -> str:
        """The positions at which a layer has a convolution of its own: A, C, D."""
        before = self.canon_at(*layer.mixers) if layer.mixers else ""
        around = self.canon_at(layer.ffn, *layer.mixers) if layer.ffn else ""
        return "".join(at for at in "ACD" if at in (before if at == "A" else around))

    def canon_problem(self, symbol: str) -> str | None:
        """Why the mixer of a symbol cannot have a canon layer on q, k, v; None where it can."""
        cls, options = self._binding("mixers", mixers, symbol, self.input_size(symbol))
        if not hasattr(options, "conv_size"):
            return (
                f"{cls.name} of {symbol!r} has no convolution that B could be; take another mixer"
            )
        if options.conv_size is None:
            return None
        return (
            f"{cls.name} of {symbol!r} has a convolution of its own that B would be; set"
            f" mixers.{symbol}.conv_size to null"
        )

    def shared_at(self, *symbols: str) -> SharedOptions | None:
        """How the layers of a symbol share weights; None where each has its own."""
        values = pick(self.shared, symbols, None)
        return None if values is None else SharedOptions(**values)

    def shared_source(self, layer_idx: int) -> int:
        """The layer whose weights a layer has: itself, or the first of its block."""
        layer = self.layers[layer_idx]
        shared = self.shared_at(*layer.mixers)
        if shared is None:
            return layer_idx
        places = [i for i, other in enumerate(self.layers) if other.mixers == layer.mixers]
        return places[places.index(layer_idx) % shared.blocks]

    def input_size(self, *symbols: str) -> int:
        """Channels that a mixer reads: D, or 2 D with the embeddings beside."""
        shared = self.shared_at(*symbols)
        return self.hidden_size * (2 if shared is not None and shared.concat_embeddings else 1)

    def uses_state(self, symbol: str) -> bool:
        """Whether the mixer of a symbol keeps a recurrent or a convolution state."""
        cls, options = self.mixer(symbol)
        return cls.uses_state(options)

    def mixer(self, symbol: str) -> tuple[type, Any]:
        """The mixer class of a symbol, and its completed options."""
        cls, options = self._binding("mixers", mixers, symbol, self.input_size(symbol))
        if "B" in self.canon_at(symbol):
            options = dataclasses.replace(options, conv_size=self.canon_width)
        return cls, attention_scale(self, symbol, options)

    def feed_forward(self, symbol: str) -> tuple[type, Any]:
        """The feed-forward class of a symbol, and its completed options."""
        return self._binding("feed_forwards", feed_forwards, symbol, self.hidden_size)

    # Names that code around transformers reads.

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first softmax mixer, else of the first with heads; 1 where none has."""
        return self._first_option("num_heads") or 1

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the first softmax mixer, else of the first with heads; 1 where none has."""
        return self._first_option("num_kv_heads", "num_heads") or 1

    @property
    def head_dim(self) -> int:
        """Head dim of the first softmax mixer, else of the first that has one, else D / heads."""
        return self._first_option("head_dim") or self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Inner width of the first feed-forward; 0 where there is none."""
        symbols = [layer.ffn for layer in self.layers if layer.ffn]
        return self.feed_forward(symbols[0])[1].intermediate_size if symbols else 0

    @property
    def num_experts(self) -> int:
        """Routed experts of the first mixture."""
        return self._expert_option("num_experts")

    num_local_experts = num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts of a token, of the first mixture."""
        return self._expert_option("top_k")

    @property
    def moe_intermediate_size(self) -> int:
        """Inner width of an expert of the first mixture."""
        return self._expert_option("intermediate_size")

    @property
    def n_positions(self) -> int:
        """`max_position_embeddings`, or a length that no text reaches; lm-eval cuts texts to it."""
        return self.max_position_embeddings or UNLIMITED

    @property
    def logit_scale(self) -> float:
        """Multiplier of the logits, that of muP included; losses of TRL read it."""
        return self.logits_multiplier / width_ratio(self)

    @property
    def lm_head_multiplier(self) -> float:
        """`logit_scale` under the name of Falcon-H1."""
        return self.logit_scale

    @property
    def logits_scaling(self) -> float:
        """Divisor of the logits, under the name of Granite."""
        return 1 / self.logit_scale

    @property
    def final_logit_softcapping(self) -> float | None:
        """`logit_softcap` under the name of Gemma 2."""
        return self.logit_softcap

    def _first_option(self, *names: str) -> int | None:
        symbols = list(dict.fromkeys(s for layer in self.layers for s in layer.mixers))
        symbols.sort(key=lambda s: self.mixer(s)[0].layer_type == "linear_attention")
        for symbol in symbols:
            options = self.mixer(symbol)[1]
            for name in names:
                if getattr(options, name, None) is not None:
                    return getattr(options, name)
        return None

    def _expert_option(self, name: str) -> int:
        for symbol in dict.fromkeys(layer.ffn for layer in self.layers if layer.ffn):
            options = self.feed_forward(symbol)[1]
            if hasattr(options, "num_experts"):
                return getattr(options, name)
        raise AttributeError(f"no layer of layout {self.layout!r} has experts")

    def states_of(self, layer: Layer) -> int:
        """States that a layer keeps, each with a slot of its own in the cache."""
        return sum(map(self.uses_state, layer.mixers)) + len(self.canon_of(layer))

    def _layer_type(self, layer: Layer) -> str:
        kinds = [self.mixer(symbol)[0].layer_type for symbol in layer.mixers]
        softmax = [kind for kind in kinds if kind != "linear_attention"]
        if self.states_of(layer):
            return "hybrid" if softmax else "linear_attention"
        # "moe" is transformers' name for a layer without a mixer: nothing is cached
        return softmax[0] if softmax else "moe"

    def _binding(self, field: str, registry: Registry, symbol: str, width: int) -> tuple[type, Any]:
        values = dict(bound(self, field).get(symbol, {}))
        values.pop("type", None)
        cls = bound_class(self, field, registry, symbol)
        options = build(cls.Options, values, f"{field}.{symbol}", [])
        return cls, options.complete(width)
