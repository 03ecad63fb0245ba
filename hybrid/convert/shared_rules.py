"""Rules common to many families: sizes, softmax attention, gated feed-forwards, experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybrid.convert.family import (
    ConfigRule,
    Flat,
    Inexpressible,
    LayerRule,
    always,
    both,
    ignored,
    key,
    rope,
)
from hybrid.convert.mtp import MTPMap
from hybrid.convert.published import NO_CLAMP
from hybrid.convert.tensor_rules import Fuse, Reorder, Rule, Split, Squeeze, Stack, renames, rule

# their activation -> ours
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}
PLAIN = {"relu2": "relu2", "gelu": "gelu", "silu": "silu"}

SIZES: tuple[ConfigRule, ...] = (
    key("vocab_size"),
    key("hidden_size"),
    key("max_position_embeddings", optional=True),
    key("tie_word_embeddings"),
    key("initializer_range"),
    key("pad_token_id"),
    key("bos_token_id"),
    key("eos_token_id"),
    always(init="fixed"),
)

LAYER = "model.layers.{i}."
MIXER = f"{LAYER}mixer."
FFN = f"{LAYER}ffn."

# two norms in a layer, each before its branch
PRE_NORMS: tuple[Rule, ...] = (
    *renames(LAYER, LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
    *renames(LAYER, LAYER, {"post_attention_layernorm": "ffn_residual.norm_in"}),
)


def ends(norm: str = "norm") -> tuple[Rule, ...]:
    """Return the rules of the embeddings, the last norm (by their name) and the head."""
    return (
        rule("model.embed_tokens.weight"),
        *renames("model.", "model.", {norm: "norm"}),
        rule("lm_head.weight"),
    )


def attention(
    letters: str = "S",
    head_dim: bool = True,
    partial: bool = False,
    drop: Sequence[str] = (),
    nope: bool = False,
) -> tuple[ConfigRule, ...]:
    """Return the rules of heads, positions and dropout of softmax attention, for several letters.

    Args:
        letters: the family's softmax letters.
        head_dim: whether their class reads it, or always uses hidden_size / heads.
        partial, drop, nope: see ``rope``.
    """

    def paths(option: str) -> list[str]:
        return [f"mixers.{letter}.{option}" for letter in letters]

    return (
        key("num_attention_heads", *paths("num_heads")),
        key("num_key_value_heads", *paths("num_kv_heads")),
        *([key("head_dim", *paths("head_dim"))] if head_dim else []),
        rope(*letters, partial=partial, drop=drop, nope=nope),
        key("attention_dropout", *paths("dropout")),
    )


def rope_by_type(**letters: str) -> ConfigRule:
    """Map one RoPE dictionary per layer type: ``rope_by_type(full_attention="S")``."""
    paths = {kind: f"mixers.{letter}.rope_parameters" for kind, letter in letters.items()}

    def read(config: Any) -> Flat:
        return {path: dict(config.rope_parameters[kind]) for kind, path in paths.items()}

    def write(flat: Flat) -> Flat:
        for path in paths.values():
            if path in flat and flat[path] is None:
                raise Inexpressible(f"{path}: expected rotary parameters in every layer, got None")
        return {"rope_parameters": {kind: dict(flat[p]) for kind, p in paths.items() if p in flat}}

    return both("rope_parameters", read=read, write=write)


def attention_bias(letters: str = "S", output: bool = True) -> ConfigRule:
    """Map ``attention_bias``: of q, k, v, and of the output projection."""
    options = ("bias", "output_bias") if output else ("bias",)
    return key("attention_bias", *[f"mixers.{s}.{option}" for s in letters for option in options])


def dense(bias: str | None = None) -> tuple[ConfigRule, ...]:
    """Return the rules of a gated dense feed-forward; ``bias`` is their key for its biases, if any."""
    return (
        key("intermediate_size", "feed_forwards.-.intermediate_size"),
        key("hidden_act", "feed_forwards.-.activation", values=GATED),
        *([key(bias, "feed_forwards.-.bias")] if bias else []),
    )


def experts(
    prefix: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Return the rules of experts: one matrix each, stacked in ours.

    Files can have stacked ones (Qwen3.5).

    Args:
        prefix: their name up to the index of the expert, such as ``model.layers.{i}.mlp.experts.``.
        names: their gate, up and down projections.
    """
    gate, up, down = (f"{prefix}{{e}}.{name}.weight" for name in names)
    return (
        rule(
            [gate, up],
            f"{FFN}experts.gate_up_proj",
            Stack(2),
            ffn="E",
            whole=f"{prefix}gate_up_proj",
        ),
        rule(down, f"{FFN}experts.down_proj", Stack(), ffn="E", whole=f"{prefix}down_proj"),
    )


ATTENTION_WEIGHTS: tuple[Rule, ...] = renames(
    f"{LAYER}self_attn.", MIXER, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="SWNA"
)
QK_NORMS: tuple[Rule, ...] = renames(
    f"{LAYER}self_attn.", MIXER, ["q_norm", "k_norm"], mixer="SWNA"
)
DENSE_WEIGHTS: tuple[Rule, ...] = renames(
    f"{LAYER}mlp.", FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"
)

QWEN_MOE: tuple[ConfigRule, ...] = (
    key("num_experts", "feed_forwards.E.num_experts"),
    key("num_experts_per_tok", "feed_forwards.E.top_k"),
    key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
    key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
    key("hidden_act", "feed_forwards.E.activation", "feed_forwards.-.activation", values=GATED),
    ignored("output_router_logits", "router_aux_loss_coef"),
)


def qwen_ffn() -> LayerRule:
    """Return the layer rule with experts in every ``decoder_sparse_step``-th layer, except
    ``mlp_only_layers``.
    """

    def read(config) -> Sequence[str]:
        step = config.decoder_sparse_step
        return [
            "E" if config.num_experts > 0 and (i + 1) % step == 0 and i not in config.mlp_only_layers
            else "-"
            for i in range(config.num_hidden_layers)
        ]  # fmt: skip

    def write(layers: Sequence[str]) -> dict:
        return {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, symbol in enumerate(layers) if symbol != "E"],
        }

    return LayerRule(("decoder_sparse_step", "mlp_only_layers"), read, write)


def simplest(near: float, wanted: float, meaning: Callable[[float], float]) -> float:
    """Return the number with the fewest digits near ``near`` whose meaning is exactly ``wanted``.

    The quotient of two floats is not always the factor that one of them was multiplied by.
    """
    beside = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    rounded = (float(f"{number:.{digits}g}") for digits in range(1, 18) for number in beside)
    return next((number for number in rounded if meaning(number) == wanted), near)


def mamba2_options(
    heads: str, head_dim: str, state: str, groups: str, conv: str, conv_bias: str, bias: str,
    expand: str,
) -> tuple[ConfigRule, ...]:  # fmt: skip
    """Map Mamba-2's sizes by the family's names for them, for the letter M."""
    return (
        key(heads, "mixers.M.num_heads"),
        key(head_dim, "mixers.M.head_dim"),
        key(state, "mixers.M.state_size"),
        key(groups, "mixers.M.num_groups"),
        key(conv, "mixers.M.conv_size"),
        key(conv_bias, "mixers.M.conv_bias"),
        key(bias, "mixers.M.bias"),
        mamba2_expand(expand),
        both("time_step_limit", read=_read_limit, write=_write_limit),
    )


def mamba2_expand(expand: str, read: Callable[[Any], Flat] = lambda config: {}) -> ConfigRule:
    """Map the expansion factor (inner width / D), which follows from the heads."""

    def write(flat: Flat) -> Flat:
        if "mixers.M.num_heads" not in flat:
            return {}
        inner = flat["mixers.M.num_heads"] * flat["mixers.M.head_dim"]
        if inner % flat["hidden_size"]:
            raise Inexpressible(
                f"mixers.M: expected num_heads * head_dim to be a multiple of hidden_size"
                f" {flat['hidden_size']}, got {inner}"
            )
        return {expand: inner // flat["hidden_size"]}

    return both(expand, read=read, write=write)


def mamba2_clamp() -> tuple[ConfigRule, ...]:
    """Clamp time steps from below by ``time_step_min``, which other classes use for initialisation
    only.
    """

    def read(config: Any) -> Flat:
        low = config.time_step_min
        if low <= NO_CLAMP:
            return {"mixers.M.dt_limit": None}
        return {"mixers.M.dt_limit": [float(low), float("inf")], "mixers.M.dt_min": low}

    def write(flat: Flat) -> Flat:
        limit = flat.get("mixers.M.dt_limit")
        return {"time_step_min": max(limit[0], NO_CLAMP) if limit else NO_CLAMP}

    return (
        both("time_step_min", read=read, write=write),
        key("time_step_max", "mixers.M.dt_max"),
        key("time_step_floor", "mixers.M.dt_floor"),
    )


def _read_limit(config: Any) -> Flat:
    limit = list(config.time_step_limit)
    return {"mixers.M.dt_limit": None if limit == [0.0, float("inf")] else limit}


def _write_limit(flat: Flat) -> Flat:
    return {"time_step_limit": tuple(flat.get("mixers.M.dt_limit") or (0.0, float("inf")))}


def mamba2_weights(theirs: str, ours: str = MIXER) -> tuple[Rule, ...]:
    """Return the rules of Mamba-2's tensors: z, x, B, C, dt are fused; x, B, C are convolved."""

    def blocks(options: Any) -> list[int]:
        shared = options.num_groups * options.state_size
        return [options.num_heads * options.head_dim, shared, shared]

    parts = [f"{ours}{name}_proj." for name in ("gate", "v", "k", "q", "dt")]
    return (
        *(
            rule(f"{theirs}in_proj.{kind}", [part + kind for part in parts], Split(), mixer="M")
            for kind in ("weight", "bias")
        ),
        rule(
            f"{theirs}conv1d.weight",
            f"{ours}conv.weight",
            Squeeze(1),
            Reorder(blocks, (2, 1, 0)),
            mixer="M",
        ),
        rule(f"{theirs}conv1d.bias", f"{ours}conv.bias", Reorder(blocks, (2, 1, 0)), mixer="M"),
        *(
            rule(f"{theirs}{name}", f"{ours}{name}", mixer="M")
            for name in ("A_log", "D", "dt_bias")
        ),
        *renames(theirs, ours, {"norm": "norm", "out_proj": "o_proj"}, mixer="M"),
    )


# gated DeltaNet, letter D, as the Qwen and OLMo hybrids name its sizes
DELTA_NET: tuple[ConfigRule, ...] = (
    key("linear_num_value_heads", "mixers.D.num_heads"),
    key("linear_num_key_heads", "mixers.D.num_key_heads"),
    key("linear_key_head_dim", "mixers.D.head_dim"),
    key("linear_value_head_dim", "mixers.D.value_head_dim"),
    key("linear_conv_kernel_dim", "mixers.D.conv_size"),
)

SHARED_EXPERT: tuple[ConfigRule, ...] = (
    key("shared_expert_intermediate_size", "feed_forwards.E.shared_intermediate_size"),
    always(feed_forwards__E__num_shared_experts=1, feed_forwards__E__shared_gate=True),
)
QWEN_MOE_WEIGHTS: tuple[Rule, ...] = (
    rule(f"{LAYER}mlp.gate.weight", f"{FFN}router.weight", ffn="E"),
    *experts(f"{LAYER}mlp.experts."),
)
SHARED_EXPERT_WEIGHTS: tuple[Rule, ...] = (
    *renames(
        f"{LAYER}mlp.shared_expert.",
        f"{FFN}shared_experts.",
        ["gate_proj", "up_proj", "down_proj"],
        ffn="E",
    ),
    rule(f"{LAYER}mlp.shared_expert_gate.weight", f"{FFN}shared_gate.weight", ffn="E"),
)


def output_gate_weights(letter: str = "S") -> tuple[Rule, ...]:
    """Return the rules of queries and output gate in one ``q_proj``, by head, and of k, v and o
    (Qwen3-Next).
    """
    theirs = f"{LAYER}self_attn."
    return (
        *(
            rule(
                f"{theirs}q_proj.{kind}",
                [f"{MIXER}q_proj.{kind}", f"{MIXER}gate_proj.{kind}"],
                Split(groups=lambda options: options.num_heads),
                mixer=letter,
            )
            for kind in ("weight", "bias")
        ),
        *renames(theirs, MIXER, ["k_proj", "v_proj", "o_proj"], mixer=letter),
    )


EQUAL_PARTS = Fuse(parts=3)


def three_convolutions(
    theirs: str, letter: str, fuse: Fuse = EQUAL_PARTS, names: Sequence[str] = "qkv"
) -> Rule:
    """Map the three convolutions of q, k and v to our single one."""
    return rule(
        [f"{theirs}{name}_conv1d.weight" for name in names],
        f"{MIXER}conv.weight",
        Squeeze(1),
        fuse,
        mixer=letter,
    )


def dense_first(key: str) -> LayerRule:
    """Return the layer rule with ``key`` dense feed-forwards first, and experts after them."""

    def read(config: Any) -> Sequence[str]:
        first = getattr(config, key)
        return ["-" if i < first else "E" for i in range(config.num_hidden_layers)]

    def write(layers: Sequence[str]) -> Flat:
        return {key: next((i for i, symbol in enumerate(layers) if symbol == "E"), len(layers))}

    return LayerRule((key,), read, write)


def mtp_after(layout: str, norm: str, copies: Mapping[str, str] | None = None) -> MTPMap:
    """Map multi-token prediction modules stored as layers after the last one, as in DeepSeek-V3.

    Args:
        layout: the layers of each module.
        norm: their name for the norm before the head, below the layer.
        copies: their names below the layer -> our tensors of which they are copies.
    """
    place = "model.layers.{first}."
    return MTPMap(
        key="num_nextn_predict_layers",
        keys=("num_mtp_layers",),  # another name in transformers' classes
        layout=lambda config: layout,
        layers=("model.layers.", "model.layers."),
        embedding_norm=f"{place}enorm",
        hidden_norm=f"{place}hnorm",
        projection=f"{place}eh_proj",
        norm=place + norm,
        copies={place + theirs: ours for theirs, ours in (copies or {}).items()},
    )


def qwen_mtp(key: str, layout: Callable[[Any], str], default: int = 0) -> MTPMap:
    """Map one multi-token prediction module with a softmax layer."""
    return MTPMap(
        key=key,
        layout=layout,
        layers=("model.layers.", "mtp.layers."),
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        norm="mtp.norm",
        shared=True,
        default=default,
    )
