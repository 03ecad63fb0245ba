"""OLMo 3: OLMo 2 with three sliding layers per full layer."""

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.gemma3_text import LETTERS, TYPES
from hybrid.convert.families.olmo2 import POST_NORMS

OLMO3 = r.register_family(
    r.Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        limits=published.own_factor,
        letters=LETTERS,
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.always(
                norm_position="reordered", mixers__S__qk_norm="layer", mixers__W__qk_norm="layer"
            ),
            *(found for found in r.attention("SW") if found.keys != ("rope_parameters",)),
            r.rope_by_type(**TYPES),
            r.attention_bias("SW"),
            r.key("sliding_window", "mixers.W.window"),
            *r.dense(),
        ),
        mixers=r.by_type(**TYPES),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *POST_NORMS, *r.ATTENTION_WEIGHTS, *r.QK_NORMS, *r.DENSE_WEIGHTS),
        legacy_rope=r.words_by_type(),
    )
)
