"""OLMo 2: layout S, reordered norms, RMSNorm over all query heads and over all key heads."""

from hybrid.convert import rules as r

POST_NORMS = r.renames(
    r.LAYER,
    r.LAYER,
    {
        "post_attention_layernorm": "mixer_residual.norm_out",
        "post_feedforward_layernorm": "ffn_residual.norm_out",
    },
)

OLMO2 = r.register_family(
    r.Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.always(norm_position="reordered", mixers__S__qk_norm="layer"),
            *r.attention(),
            r.attention_bias(),
            *r.dense(),
        ),
        mixers=r.everywhere("S"),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *POST_NORMS, *r.ATTENTION_WEIGHTS, *r.QK_NORMS, *r.DENSE_WEIGHTS),
    )
)
