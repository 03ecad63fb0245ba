"""Qwen3: layout S, pre-norm, RMSNorm on the queries and keys of each head."""

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    PRE_NORMS,
    QK_NORMS,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
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

QWEN3 = register_family(
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention(),
            attention_bias(),
            always(mixers__S__qk_norm="head"),
            *dense(),
            must("use_sliding_window", False),
            ignored("sliding_window", "max_window_layers", "layer_types"),
        ),
        mixers=everywhere("S"),
        ffn=everywhere("-"),
        weights=(*ends(), *PRE_NORMS, *ATTENTION_WEIGHTS, *QK_NORMS, *DENSE_WEIGHTS),
    )
)
