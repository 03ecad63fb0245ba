"""Qwen3: layout S, pre-norm, RMSNorm on the queries and keys of each head."""

from hybrid.convert import rules as r

QWEN3 = r.register_family(
    r.Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention(),
            r.attention_bias(),
            r.always(mixers__S__qk_norm="head"),
            *r.dense(),
            r.must("use_sliding_window", False),
            r.ignored("sliding_window", "max_window_layers", "layer_types"),
        ),
        mixers=r.everywhere("S"),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *r.PRE_NORMS, *r.ATTENTION_WEIGHTS, *r.QK_NORMS, *r.DENSE_WEIGHTS),
    )
)
