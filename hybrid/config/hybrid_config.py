"""HybridConfig: a layout string, the mixers bound to its letters, and the sizes of the model."""

import copy
import dataclasses
import inspect
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedConfig

from hybrid.config.block_options import NormPosition
from hybrid.config.declare import Count, Count0, NotNegative, Number, Positive
from hybrid.config.fields import Combine, Init, LossBackend, NormName, StackFields, width_ratio
from hybrid.config.options import ConfigError
from hybrid.config.parallel import base_ep_plan, base_tp_plan
from hybrid.config.registry import load_model_classes
from hybrid.config.spec import FULL, StackSpec, resolve_stack
from hybrid.config.validation import DEEPEST, WIDEST, find_mistakes, standard_keys
from hybrid.layout import Layer

ModelSize = Annotated[int, Field(ge=1, le=WIDEST)]

UNLIMITED = 2**31 - 1
"""Value of ``n_positions`` for a model without a maximum context length."""

DERIVED = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""Derived sizes under transformers' names; read by other libraries, never stored."""


class Values(dict[str, Any]):
    """The keys of a config; look-ups also return derived sizes that are not keys.

    A copy with overrides, or a file, thus holds no value that another key could contradict.
    """

    def __init__(self, values: dict[str, Any], derived: dict[str, Any]) -> None:
        super().__init__(values)
        self.derived = derived

    def __missing__(self, key: str) -> Any:
        return self.derived[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.derived

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or a derived size."""
        return super().get(key, self.derived.get(key, default))


class HybridConfig(PreTrainedConfig):
    """Configuration of a hybrid language model.

    Args:
        layout: layout string of the stack, e.g. ``LLLS`` (see ``hybrid.layout``).
        num_hidden_layers: number of layers; the layout repeats to fill it and must divide it.
            Default: the length of the layout.
        ffn: pattern of the feed-forwards that follow the mixers, repeated cyclically (``-`` dense,
            ``E`` mixture of experts); empty for none. Or one pattern per symbol, for the layers of
            that symbol: ``{"S": "E", "default": "-"}``. A layout that names feed-forwards is taken
            literally and requires the default here.
        mixers: symbol -> options of its mixer. ``type`` names the mixer and may be omitted for
            symbols with a default mixer: ``{"S": {"num_heads": 8}, "Q": {"type":
            "softmax_attention", "rope_parameters": null}}``.
        feed_forwards: the same for ``-`` and ``E``.
        vocab_size, hidden_size: V and the model dim D.
        norm, norm_eps: ``rmsnorm``, ``layernorm``, ``zero_centered_rmsnorm`` (Gemma, Qwen3-Next),
            or ``weightless_rmsnorm``; see ``hybrid.nn.norms``.
        norm_position: ``pre``: x + f(norm(x)). ``post``: norm(x + f(x)) (arXiv 1706.03762).
            ``sandwich``: x + norm(f(norm(x))) (Gemma 2). ``reordered``: x + norm(f(x)) (OLMo 2).
            ``normed``: n + f(n), n = norm(x) (MiniMax-01, arXiv 2501.08313). Or per symbol (see
            ``hybrid.config.block_options``): ``{"S": "reordered", "default": "pre"}`` (OLMo
            Hybrid).
        residuals: symbol -> multipliers of its residual branches, ``input_multiplier``,
            ``output_multiplier`` and ``skip_multiplier`` (``block_options.ResidualOptions``;
            Granite, Falcon-H1, MiniMax-01): ``{"default": {"output_multiplier": 0.22}}``.
        embedding_multiplier: multiplies the token embeddings (Granite, Falcon-H1);
            ``sqrt_hidden_size``: sqrt(D), rounded to the dtype of the weights (Gemma, arXiv
            2403.08295). Not applied to ``inputs_embeds``.
        embedding_norm: normalise the input of the stack, with a norm of type ``norm`` (RWKV).
        logits_multiplier: multiplies the logits (Falcon-H1's ``lm_head_multiplier``, Granite's 1 /
            ``logits_scaling``).
        init: initialisation scheme. ``fixed``: std ``initializer_range`` everywhere.
            ``depth_scaled``: as in GPT-2, projections into the residual stream divided by
            sqrt(number of residual branches). ``xavier``: Xavier-normal matrices (Glorot and Bengio
            2010), embeddings with std ``initializer_range``. ``deepnorm`` (arXiv 2203.00555): as
            ``xavier``, with values, outputs and feed-forwards scaled by (4 M)^(-1/4) for M residual
            branches, and a default skip multiplier of M^(1/4); requires norm_position ``post`` or
            ``normed``.
        initializer_range: standard deviation of the initialisation.
        parallel_combine: how parallel mixers of one layer are combined: ``mean``, ``sum``,
            ``concat``, ``learned`` or ``learned_scalar``; see
            ``hybrid.modeling.layer.ParallelMixers``.
        canon: positions of canon layers, short causal convolutions with a residual, as ``ACD`` or a
            list, or per symbol (see ``hybrid.modeling.canon``); null for none. ``B`` adds the
            residual to the convolution of the mixers of that symbol.
        canon_width: kernel width of canon layers, in tokens.
        shared: symbol -> how its layers share their weights: ``blocks``, ``lora_rank``, ... (see
            ``hybrid.config.block_options.SharedOptions``; Zamba2).
        z_loss: lambda of the term lambda log^2 Z that is added to the loss in training, where Z is
            the sum of a token's exponentiated logits (PaLM, arXiv 2204.02311: 0.0001; OLMo 2:
            0.00001).
        logit_softcap: c of c tanh(logits / c); null for none (Gemma 2, arXiv 2408.00118: 30).
        loss_backend: how the loss is computed from hidden states: ``chunked``, ``liger`` or
            ``full``; see ``hybrid.modeling.losses``.
        num_mtp_layers: number of multi-token prediction modules (arXiv 2412.19437, section 2.2);
            see ``hybrid.modeling.mtp``.
        mtp_layout: layout of the layers of each module; null for one layer like the last of the
            stack.
        mtp_loss_weight: weight of the mean of their losses (0.3, then 0.1, in DeepSeek-V3).
        mup_base_width: hidden_size at which initialisation and learning rates were tuned, and from
            which they are scaled (muP, arXiv 2203.03466; see ``hybrid.modeling.mup``); null for no
            scaling.
        max_position_embeddings: maximum sequence length of the model in tokens; null for no limit.
        tie_word_embeddings: share the embedding with the output head.
        use_cache: return a cache from forward.
        imported_from: the published family that the model was imported from, by its ``model_type``;
            ``hybrid export`` without ``--as`` exports to it if the config still fits.

    Raises:
        ConfigError: (a ValueError) with one line for each mistake in the arguments.
    """

    model_type = "hybrid"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: Annotated[int, Field(ge=1, le=1 << 26)] = 32000
    hidden_size: ModelSize = 512
    layout: str = "LLLS"
    num_hidden_layers: Annotated[int, Field(ge=1, le=DEEPEST)] | None = None
    ffn: str | dict[str, str] | None = "-"
    mixers: dict[str, dict] | None = None
    feed_forwards: dict[str, dict] | None = None
    norm: NormName = "rmsnorm"
    norm_eps: Positive = 1e-6
    norm_position: NormPosition | dict[str, NormPosition] = "pre"
    residuals: dict[str, dict] | None = None
    embedding_multiplier: Number | Literal["sqrt_hidden_size"] = 1.0
    embedding_norm: bool = False
    logits_multiplier: Number = 1.0
    init: Init = "depth_scaled"
    initializer_range: Positive = 0.02
    parallel_combine: Combine = "mean"
    canon: str | list[str] | dict[str, str | list[str]] | None = None
    canon_width: Annotated[int, Field(ge=2, le=1 << 10)] = 4
    shared: dict[str, dict] | None = None
    z_loss: NotNegative = 0.0
    logit_softcap: Positive | None = None
    loss_backend: LossBackend = "chunked"
    num_mtp_layers: Annotated[int, Field(ge=0, le=1 << 10)] = 0
    mtp_layout: str | None = None
    mtp_loss_weight: NotNegative = 0.3
    mup_base_width: ModelSize | None = None
    max_position_embeddings: Count | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: Count0 | None = None
    bos_token_id: Count0 | None = None
    eos_token_id: Count0 | list[Count0] | None = None
    imported_from: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        hints = inspect.get_annotations(HybridConfig)
        mistakes, layers = find_mistakes(self, hints, kwargs)
        if mistakes:
            raise ConfigError(mistakes, "the model config")
        self.num_hidden_layers = len(layers)
        self._resolve(layers)
        load_model_classes()
        super().__post_init__(**kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        load_model_classes()
        vars(self).update(state)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: a checkpoint does not contain a copy of the code of this package."""

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that can be loaded again, without attributes attached by other code.

        Look-ups also return derived sizes, which PEFT reads from this dict; see ``Values``.
        """
        known = {f.name for f in dataclasses.fields(self)} | standard_keys()
        values = {key: value for key, value in super().to_dict().items() if key in known}
        return Values(values, {name: getattr(self, name) for name in DERIVED})

    def changed(self, **fields: Any) -> "HybridConfig":
        """Return a copy with other fields, without completing or validating them."""
        other = copy.copy(self)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    @property
    def stack(self) -> StackSpec:
        """The resolved stack, with one ``LayerSpec`` for each layer.

        The result is cached until a field is assigned.
        """
        known = vars(self).get("_resolved")
        if known is None or known[0] != {name: getattr(self, name) for name in _STACK_FIELDS}:
            return self._resolve()
        return known[1]

    def _resolve(self, layers: tuple[Layer, ...] | None = None) -> StackSpec:
        """Resolve the stack and cache it together with the fields that it depends on."""
        stack = resolve_stack(self, layers)
        fields = {name: getattr(self, name) for name in _STACK_FIELDS}
        vars(self)["_resolved"] = copy.deepcopy(fields), stack
        return stack

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The symbols of the stack, layer by layer."""
        return tuple(spec.layer for spec in self.stack)

    # Attributes read by transformers' caches and masks.

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, from which transformers' caches choose the cache layer class.

        See ``hybrid.modeling.cache_layers`` for the types defined in this package.
        """
        return [layer.layer_type for layer in self.stack]

    def validate(self) -> None:
        """Run transformers' validators, replaced by methods of this class of the same name."""
        for validator in self.__class_validators__:
            getattr(self, validator.__name__)()

    def validate_layer_type(self) -> None:
        """Do nothing: layer types follow from the layout, and some are unknown to transformers."""

    @property
    def sliding_window(self) -> None:
        """None; a window is an option of a symbol."""
        return None

    @sliding_window.setter
    def sliding_window(self, value: int | None) -> None:
        """Accept values without effect: any value if no layer has keys, else only None."""
        if value is not None and self.stack.has_keys:
            raise ValueError(
                f"sliding_window: expected None, since windows are set per symbol, got {value}; try"
                " a symbol of type 'sliding_window_attention' with mixers.SYMBOL.window"
            )

    # Parallel plans read by transformers, which follow from the layout.

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """Tensor parallel plan of the stack (see ``hybrid.config.parallel``), unless assigned."""
        return vars(self).get("_assigned_tp_plan", base_tp_plan(self.stack))

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        # transformers 5.17 to 5.20 assign the plan plus a rule for the embedding, already present
        if plan != self.base_model_tp_plan:
            vars(self)["_assigned_tp_plan"] = plan

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:  # type: ignore[override]
        """Expert parallel plan of the stack, unless assigned; None without experts."""
        return vars(self).get("_assigned_ep_plan", base_ep_plan(self.stack))

    @base_model_ep_plan.setter
    def base_model_ep_plan(self, plan: dict[str, str] | None) -> None:
        vars(self)["_assigned_ep_plan"] = plan

    # Attributes read by libraries built on transformers.

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first softmax mixer, else of the first mixer with heads; 1 without
        one.
        """
        return self._first_option("num_heads") or 1

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the first softmax mixer, else of the first with heads; 1 without one."""
        return self._first_option("num_kv_heads", "num_heads") or 1

    @property
    def head_dim(self) -> int:
        """Head dim of the first softmax mixer, else of the first with one, else D / heads."""
        return self._first_option("head_dim") or self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Inner width of the first feed-forward; 0 without one."""
        parts = [*self.stack.feed_forwards.values()]
        return parts[0].options.intermediate_size if parts else 0

    @property
    def num_experts(self) -> int:
        """Number of routed experts in the first mixture of experts."""
        return self._expert_option("num_experts")

    num_local_experts = num_experts

    @property
    def num_experts_per_tok(self) -> int:
        """Routed experts per token in the first mixture of experts."""
        return self._expert_option("top_k")

    @property
    def moe_intermediate_size(self) -> int:
        """Inner width of a routed expert in the first mixture of experts."""
        return self._expert_option("intermediate_size")

    @property
    def n_positions(self) -> int:
        """``max_position_embeddings``, or a very large length; lm-eval truncates texts to it."""
        return self.max_position_embeddings or UNLIMITED

    @property
    def logit_scale(self) -> float:
        """Multiplier of the logits, including muP's; read by the losses of TRL."""
        return self.logits_multiplier / width_ratio(self)

    @property
    def lm_head_multiplier(self) -> float:
        """``logit_scale`` under the name of Falcon-H1."""
        return self.logit_scale

    @property
    def logits_scaling(self) -> float:
        """Divisor of the logits, under the name of Granite."""
        return 1 / self.logit_scale

    @property
    def final_logit_softcapping(self) -> float | None:
        """``logit_softcap`` under the name of Gemma 2."""
        return self.logit_softcap

    def _first_option(self, *names: str) -> int | None:
        specs = sorted(self.stack.mixers.values(), key=lambda m: m.cls.layer_type != FULL)
        for spec in specs:
            for name in names:
                if getattr(spec.options, name, None) is not None:
                    return getattr(spec.options, name)
        return None

    def _expert_option(self, name: str) -> int:
        for part in self.stack.feed_forwards.values():
            if hasattr(part.options, "num_experts"):
                return getattr(part.options, name)
        raise AttributeError(
            f"layout: expected a layer with experts for {name}, got {self.layout!r}"
        )


# The fields that resolution reads.
_STACK_FIELDS = tuple(inspect.get_annotations(StackFields))
