"""OLMo 2: layout S, norms behind the branches, RMSNorm over all queries and over all keys."""

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    LAYER,
    QK_NORMS,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
)
from hybrid.convert.family import Family, always, everywhere, key, register_family
from hybrid.convert.weights import renames

POST_NORMS = renames(
    LAYER,
    LAYER,
    {
        "post_attention_layernorm": "mixer_residual.norm_out",
        "post_feedforward_layernorm": "ffn_residual.norm_out",
    },
)

OLMO2 = register_family(
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        letters={"S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            always(norm_position="reordered", mixers__S__qk_norm="layer"),
            *attention(),
            attention_bias(),
            *dense(),
        ),
        mixers=everywhere("S"),
        ffn=everywhere("-"),
        weights=(*ends(), *POST_NORMS, *ATTENTION_WEIGHTS, *QK_NORMS, *DENSE_WEIGHTS),
    )
)
