"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer or periodically."""

from hybrid.convert import rules as r

QWEN3_MOE = r.register_family(
    r.Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention(),
            r.attention_bias(),
            r.always(mixers__S__qk_norm="head"),
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            *r.QWEN_MOE,
            r.must("use_sliding_window", False),
            r.ignored("sliding_window"),
        ),
        mixers=r.everywhere("S"),
        ffn=r.qwen_ffn(),
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *r.ATTENTION_WEIGHTS,
            *r.QK_NORMS,
            *r.DENSE_WEIGHTS,
            *r.QWEN_MOE_WEIGHTS,
        ),
    )
)
