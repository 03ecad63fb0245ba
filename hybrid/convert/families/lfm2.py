"""LFM2 and LFM2-MoE: gated short convolutions with some softmax layers."""

from __future__ import annotations

from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

CONV, SOFTMAX, FEED = f"{r.LAYER}conv.", f"{r.LAYER}self_attn.", f"{r.LAYER}feed_forward."


def _read_width(config: Any) -> r.Flat:
    """Return the inner width that the published class derives from ``intermediate_size``."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = int(config.block_ffn_dim_multiplier * width)
            width = config.block_multiple_of * -(-width // config.block_multiple_of)
    return {"feed_forwards.-.intermediate_size": width}


def _write_width(flat: r.Flat) -> r.Flat:
    width = flat.get("feed_forwards.-.intermediate_size")
    return {} if width is None else {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


SHARED: tuple[r.ConfigRule, ...] = (
    *r.SIZES,
    r.key("norm_eps"),
    *(found for found in r.attention(head_dim=False) if found.keys != ("attention_dropout",)),
    r.always(mixers__S__qk_norm="head"),
    r.key("conv_L_cache", "mixers.C.conv_size"),
    r.key("conv_bias", "mixers.C.bias"),
)
WEIGHTS: tuple[r.Rule, ...] = (
    *r.ends("embedding_norm"),
    *r.renames(r.LAYER, r.LAYER, {"operator_norm": "mixer_residual.norm_in"}),
    *r.renames(r.LAYER, r.LAYER, {"ffn_norm": "ffn_residual.norm_in"}),
    *r.renames(SOFTMAX, r.MIXER, ["q_proj", "k_proj", "v_proj"], mixer="S"),
    *r.renames(
        SOFTMAX,
        r.MIXER,
        {"out_proj": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm"},
        mixer="S",
    ),
    *r.renames(CONV, r.MIXER, {"in_proj": "in_proj", "out_proj": "o_proj"}, mixer="C"),
    r.rule(f"{CONV}conv.weight", f"{r.MIXER}conv.weight", r.Squeeze(1), mixer="C"),
    r.rule(f"{CONV}conv.bias", f"{r.MIXER}conv.bias", mixer="C"),
    *r.renames(FEED, r.FFN, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}, ffn="-"),
)
LAYERS = r.by_type(full_attention="S", conv="C")

LFM2 = r.register_family(
    r.Family(
        name="lfm2",
        architecture="Lfm2ForCausalLM",
        limits=published.untied,
        published=published.lfm2,
        letters={"C": "gated_short_convolution", "S": "softmax_attention"},
        config=(
            *SHARED,
            r.both(
                "intermediate_size", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier",
                "block_multiple_of", read=_read_width, write=_write_width,
            ),
            r.ignored("full_attn_idxs"),
        ),
        mixers=LAYERS,
        ffn=r.everywhere("-"),
        weights=WEIGHTS,
    )
)  # fmt: skip
LFM2_MOE = r.register_family(
    r.Family(
        name="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        limits=published.untied,
        published=published.lfm2,
        letters={"C": "gated_short_convolution", "S": "softmax_attention"},
        config=(
            *SHARED,
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            r.key("num_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
            r.key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
            r.key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
            r.key("use_expert_bias", "feed_forwards.E.score_correction_bias"),
            r.always(
                feed_forwards__E__score_function="sigmoid", feed_forwards__E__normalize_epsilon=1e-6
            ),
            r.ignored("output_router_logits"),
        ),
        mixers=LAYERS,
        ffn=r.dense_first("num_dense_layers"),
        weights=(
            *WEIGHTS,
            r.rule(f"{FEED}gate.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(f"{FEED}expert_bias", f"{r.FFN}router.score_correction_bias", ffn="E"),
            *r.experts(f"{FEED}experts.", ("w1", "w3", "w2")),
        ),
    )
)
