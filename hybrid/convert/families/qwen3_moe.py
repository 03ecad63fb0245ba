"""Qwen3-MoE: Qwen3 with a mixture of experts, every layer or every so many."""

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    PRE_NORMS,
    QK_NORMS,
    QWEN_MOE,
    QWEN_MOE_WEIGHTS,
    SIZES,
    attention,
    attention_bias,
    ends,
    qwen_ffn,
)
from hybrid.convert.family import (
    Family,
    always,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)

QWEN3_MOE = register_family(
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention(),
            attention_bias(),
            always(mixers__S__qk_norm="head"),
            key("intermediate_size", "feed_forwards.-.intermediate_size"),
            *QWEN_MOE,
            must("use_sliding_window", False),
            ignored("sliding_window"),
        ),
        mixers=everywhere("S"),
        ffn=qwen_ffn(),
        weights=(
            *ends(),
            *PRE_NORMS,
            *ATTENTION_WEIGHTS,
            *QK_NORMS,
            *DENSE_WEIGHTS,
            *QWEN_MOE_WEIGHTS,
        ),
    )
)
