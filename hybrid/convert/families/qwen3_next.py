"""Qwen3-Next: DDDS, gated softmax, partial rotary, zero-centred norms, shared experts."""

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = f"{r.LAYER}linear_attn."

# rules shared with Qwen3.5; the convolution has the activation of the feed-forwards
QWEN_HYBRID = (
    *r.SIZES,
    r.always(norm="zero_centered_rmsnorm"),
    r.key("rms_norm_eps", "norm_eps"),
    *r.attention(partial=True, drop=("mrope_section", "mrope_interleaved")),
    r.attention_bias(),
    r.always(
        mixers__S__qk_norm="head",
        mixers__S__qk_norm_type="zero_centered_rmsnorm",
        mixers__S__output_gate=True,
    ),
    *r.DELTA_NET,
    r.must("hidden_act", "silu"),
)
QWEN_EXPERTS = (
    r.key("num_experts", "feed_forwards.E.num_experts"),
    r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
    r.key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
    *r.SHARED_EXPERT,
    r.ignored("output_router_logits", "router_aux_loss_coef"),
)
DELTA_NET_WEIGHTS = (
    r.rule(f"{THEIRS}conv1d.weight", f"{r.MIXER}conv.weight", r.Squeeze(1), mixer="D"),
    r.rule(f"{THEIRS}A_log", f"{r.MIXER}A_log", mixer="D"),
    r.rule(f"{THEIRS}dt_bias", f"{r.MIXER}dt_bias", mixer="D"),
    *r.renames(THEIRS, r.MIXER, {"norm": "norm", "out_proj": "o_proj"}, mixer="D"),
)
DENSE_WIDTH = r.key("intermediate_size", "feed_forwards.-.intermediate_size")

FFN = r.qwen_ffn()

QWEN3_NEXT = r.register_family(
    r.Family(
        name="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        limits=published.irregular,
        published=published.interval,
        letters={"D": "gated_delta_net", "S": "softmax_attention"},
        config=(
            *QWEN_HYBRID,
            DENSE_WIDTH,
            *QWEN_EXPERTS,
            r.key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
        ),
        mixers=r.by_type(linear_attention="D", full_attention="S"),
        ffn=FFN,
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *r.output_gate_weights(),
            *r.QK_NORMS,
            r.rule(
                f"{THEIRS}in_proj_qkvz.weight",
                [f"{r.MIXER}{name}_proj.weight" for name in ("q", "k", "v", "gate")],
                r.Split(groups=lambda options: options.num_key_heads),
                mixer="D",
            ),
            r.rule(
                f"{THEIRS}in_proj_ba.weight",
                [f"{r.MIXER}beta_proj.weight", f"{r.MIXER}decay_proj.weight"],
                r.Split(groups=lambda options: options.num_key_heads),
                mixer="D",
            ),
            *DELTA_NET_WEIGHTS,
            *r.DENSE_WEIGHTS,
            *r.QWEN_MOE_WEIGHTS,
            *r.SHARED_EXPERT_WEIGHTS,
        ),
        # no published config has the key, but the checkpoints contain one module
        mtp=r.qwen_mtp(
            "num_nextn_predict_layers", lambda config: f"S{FFN.read(config)[0]}", default=1
        ),
    )
)
