"""Llama and what shares its architecture (SmolLM2): layout S, pre-norm, gated feed-forwards."""

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    PRE_NORMS,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
)
from hybrid.convert.family import Family, everywhere, ignored, key, register_family

LLAMA = register_family(
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention(),
            attention_bias(),
            *dense("mlp_bias"),
            ignored("pretraining_tp"),
        ),
        mixers=everywhere("S"),
        ffn=everywhere("-"),
        weights=(*ends(), *PRE_NORMS, *ATTENTION_WEIGHTS, *DENSE_WEIGHTS),
    )
)
