"""OLMo 3: OLMo 2 with three sliding layers to one full."""

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    QK_NORMS,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
    rope_by_type,
)
from hybrid.convert.families.gemma3_text import LETTERS, TYPES
from hybrid.convert.families.olmo2 import POST_NORMS
from hybrid.convert.family import Family, always, by_type, everywhere, key, register_family
from hybrid.convert.older import words_by_type

OLMO3 = register_family(
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        letters=LETTERS,
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            always(
                norm_position="reordered", mixers__S__qk_norm="layer", mixers__W__qk_norm="layer"
            ),
            *(found for found in attention("SW") if found.keys != ("rope_parameters",)),
            rope_by_type(**TYPES),
            attention_bias("SW"),
            key("sliding_window", "mixers.W.window"),
            *dense(),
        ),
        mixers=by_type(**TYPES),
        ffn=everywhere("-"),
        weights=(*ends(), *POST_NORMS, *ATTENTION_WEIGHTS, *QK_NORMS, *DENSE_WEIGHTS),
        older=words_by_type(),
    )
)
