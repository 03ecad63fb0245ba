"""Qwen3-Next: DDDS, an output gate on softmax, partial rotary, zero-centred norms, shared experts."""

from hybrid.convert import published
from hybrid.convert.families.common import (
    DELTA_NET,
    DENSE_WEIGHTS,
    LAYER,
    MIXER,
    PRE_NORMS,
    QK_NORMS,
    QWEN_MOE_WEIGHTS,
    SHARED_EXPERT,
    SHARED_EXPERT_WEIGHTS,
    SIZES,
    attention,
    attention_bias,
    ends,
    output_gate_weights,
    qwen_ffn,
    qwen_mtp,
)
from hybrid.convert.family import Family, always, by_type, ignored, key, must, register_family
from hybrid.convert.weights import Split, Squeeze, renames, rule

THEIRS = f"{LAYER}linear_attn."

# what Qwen3.5 shares with it; the activation of the convolution is that of the feed-forwards
QWEN_HYBRID = (
    *SIZES,
    always(norm="zero_centered_rmsnorm"),
    key("rms_norm_eps", "norm_eps"),
    *attention(partial=True, drop=("mrope_section", "mrope_interleaved")),
    attention_bias(),
    always(
        mixers__S__qk_norm="head",
        mixers__S__qk_norm_type="zero_centered_rmsnorm",
        mixers__S__output_gate=True,
    ),
    *DELTA_NET,
    must("hidden_act", "silu"),
)
QWEN_EXPERTS = (
    key("num_experts", "feed_forwards.E.num_experts"),
    key("num_experts_per_tok", "feed_forwards.E.top_k"),
    key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
    *SHARED_EXPERT,
    ignored("output_router_logits", "router_aux_loss_coef"),
)
DELTA_NET_WEIGHTS = (
    rule(f"{THEIRS}conv1d.weight", f"{MIXER}conv.weight", Squeeze(1), mixer="D"),
    rule(f"{THEIRS}A_log", f"{MIXER}A_log", mixer="D"),
    rule(f"{THEIRS}dt_bias", f"{MIXER}dt_bias", mixer="D"),
    *renames(THEIRS, MIXER, {"norm": "norm", "out_proj": "o_proj"}, mixer="D"),
)
DENSE_WIDTH = key("intermediate_size", "feed_forwards.-.intermediate_size")

FFN = qwen_ffn()

QWEN3_NEXT = register_family(
    Family(
        name="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        limits=published.irregular,
        published=published.interval,
        letters={"D": "gated_delta_net", "S": "softmax_attention"},
        config=(
            *QWEN_HYBRID,
            DENSE_WIDTH,
            *QWEN_EXPERTS,
            key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
        ),
        mixers=by_type(linear_attention="D", full_attention="S"),
        ffn=FFN,
        weights=(
            *ends(),
            *PRE_NORMS,
            *output_gate_weights(),
            *QK_NORMS,
            rule(
                f"{THEIRS}in_proj_qkvz.weight",
                [f"{MIXER}{name}_proj.weight" for name in ("q", "k", "v", "gate")],
                Split(groups=lambda options: options.num_key_heads),
                mixer="D",
            ),
            rule(
                f"{THEIRS}in_proj_ba.weight",
                [f"{MIXER}beta_proj.weight", f"{MIXER}decay_proj.weight"],
                Split(groups=lambda options: options.num_key_heads),
                mixer="D",
            ),
            *DELTA_NET_WEIGHTS,
            *DENSE_WEIGHTS,
            *QWEN_MOE_WEIGHTS,
            *SHARED_EXPERT_WEIGHTS,
        ),
        # no published config has the key; its weights say that there is one
        mtp=qwen_mtp(
            "num_nextn_predict_layers", lambda config: f"S{FFN.read(config)[0]}", default=1
        ),
    )
)
