"""LFM2 and LFM2-MoE: gated short convolutions with a softmax layer now and then."""

from __future__ import annotations

from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    FFN,
    LAYER,
    MIXER,
    SIZES,
    attention,
    dense_first,
    ends,
    experts,
)
from hybrid.convert.family import (
    ConfigRule,
    Family,
    Flat,
    always,
    both,
    by_type,
    everywhere,
    ignored,
    key,
    register_family,
)
from hybrid.convert.weights import Rule, Squeeze, renames, rule

CONV, SOFTMAX, FEED = f"{LAYER}conv.", f"{LAYER}self_attn.", f"{LAYER}feed_forward."


def _read_width(config: Any) -> Flat:
    """The inner width that their class makes of `intermediate_size`."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = int(config.block_ffn_dim_multiplier * width)
            width = config.block_multiple_of * -(-width // config.block_multiple_of)
    return {"feed_forwards.-.intermediate_size": width}


def _write_width(flat: Flat) -> Flat:
    width = flat.get("feed_forwards.-.intermediate_size")
    return {} if width is None else {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


SHARED: tuple[ConfigRule, ...] = (
    *SIZES,
    key("norm_eps"),
    *(found for found in attention(head_dim=False) if found.keys != ("attention_dropout",)),
    always(mixers__S__qk_norm="head"),
    key("conv_L_cache", "mixers.C.conv_size"),
    key("conv_bias", "mixers.C.bias"),
)
WEIGHTS: tuple[Rule, ...] = (
    *ends("embedding_norm"),
    *renames(LAYER, LAYER, {"operator_norm": "mixer_residual.norm_in"}),
    *renames(LAYER, LAYER, {"ffn_norm": "ffn_residual.norm_in"}),
    *renames(SOFTMAX, MIXER, ["q_proj", "k_proj", "v_proj"], mixer="S"),
    *renames(
        SOFTMAX,
        MIXER,
        {"out_proj": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm"},
        mixer="S",
    ),
    *renames(CONV, MIXER, {"in_proj": "in_proj", "out_proj": "o_proj"}, mixer="C"),
    rule(f"{CONV}conv.weight", f"{MIXER}conv.weight", Squeeze(1), mixer="C"),
    rule(f"{CONV}conv.bias", f"{MIXER}conv.bias", mixer="C"),
    *renames(FEED, FFN, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}, ffn="-"),
)
LAYERS = by_type(full_attention="S", conv="C")

LFM2 = register_family(
    Family(
        name="lfm2",
        architecture="Lfm2ForCausalLM",
        limits=published.untied,
        published=published.lfm2,
        letters={"C": "gated_short_convolution", "S": "softmax_attention"},
        config=(
            *SHARED,
            both(
                "intermediate_size", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
                "block_multiple_of", read=_read_width, write=_write_width,
            ),
            ignored("full_attn_idxs"),
        ),
        mixers=LAYERS,
        ffn=everywhere("-"),
        weights=WEIGHTS,
    )
)  # fmt: skip
LFM2_MOE = register_family(
    Family(
        name="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        limits=published.untied,
        published=published.lfm2,
        letters={"C": "gated_short_convolution", "S": "softmax_attention"},
        config=(
            *SHARED,
            key("intermediate_size", "feed_forwards.-.intermediate_size"),
            key("num_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
            key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
            key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
            key("use_expert_bias", "feed_forwards.E.score_correction_bias"),
            always(
                feed_forwards__E__score_function="sigmoid", feed_forwards__E__normalize_epsilon=1e-6
            ),
            ignored("output_router_logits"),
        ),
        mixers=LAYERS,
        ffn=dense_first("num_dense_layers"),
        weights=(
            *WEIGHTS,
            rule(f"{FEED}gate.weight", f"{FFN}router.weight", ffn="E"),
            rule(f"{FEED}expert_bias", f"{FFN}router.score_correction_bias", ffn="E"),
            *experts(f"{FEED}experts.", ("w1", "w3", "w2")),
        ),
    )
)
