"""Llama and models of its architecture (SmolLM2): layout S, pre-norm, gated feed-forwards."""

from hybrid.convert import rules as r

LLAMA = r.register_family(
    r.Family(
        name="llama",
        architecture="LlamaForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention(),
            r.attention_bias(),
            *r.dense("mlp_bias"),
            r.ignored("pretraining_tp"),
        ),
        mixers=r.everywhere("S"),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *r.PRE_NORMS, *r.ATTENTION_WEIGHTS, *r.DENSE_WEIGHTS),
    )
)
