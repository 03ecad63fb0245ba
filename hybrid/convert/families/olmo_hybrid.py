"""OLMo Hybrid: DDDS, norms before the branches of D and behind those of S, negative eigenvalues."""

from typing import Any

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DELTA_NET,
    DENSE_WEIGHTS,
    LAYER,
    MIXER,
    QK_NORMS,
    SIZES,
    attention,
    attention_bias,
    ends,
    three_convolutions,
)
from hybrid.convert.family import (
    Family,
    always,
    by_type,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import Fuse, renames, rule

THEIRS = f"{LAYER}linear_attn."


def _channels(options: Any) -> list[int]:
    keys = options.num_key_heads * options.head_dim
    return [keys, keys, options.num_heads * options.value_head_dim]


OLMO_HYBRID = register_family(
    Family(
        name="olmo_hybrid",
        architecture="OlmoHybridForCausalLM",
        filed=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
        letters={"D": "gated_delta_net", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            always(norm_position__D="pre", norm_position__S="reordered"),
            *attention(nope=True),
            attention_bias(),
            always(mixers__S__qk_norm="layer"),
            *DELTA_NET,
            key("linear_allow_neg_eigval", "mixers.D.negative_eigenvalues"),
            always(mixers__D__output_norm_eps=1e-5),
            key("intermediate_size", "feed_forwards.-.intermediate_size"),
            must("hidden_act", "silu"),
            *(ignored(f"linear_a_log_{end}", f"linear_dt_{end}") for end in ("min", "max")),
            ignored("linear_dt_init_floor"),
        ),
        mixers=by_type(linear_attention="D", full_attention="S"),
        ffn=everywhere("-"),
        weights=(
            *ends(),
            *renames(
                LAYER,
                LAYER,
                {
                    "attention_layer_norm": "mixer_residual.norm_in",
                    "feedforward_layer_norm": "ffn_residual.norm_in",
                },
                mixer="D",
            ),
            *renames(
                LAYER,
                LAYER,
                {
                    "feedforward_layer_norm": "mixer_residual.norm_out",
                    "post_feedforward_layernorm": "ffn_residual.norm_out",
                },
                mixer="S",
            ),
            *ATTENTION_WEIGHTS,
            *QK_NORMS,
            # their save cuts the three in equal parts
            three_convolutions(THEIRS, "D", Fuse(_channels, loose=True)),
            *(rule(THEIRS + name, MIXER + name, mixer="D") for name in ("A_log", "dt_bias")),
            *renames(
                THEIRS,
                MIXER,
                {
                    **{f"{name}_proj": f"{name}_proj" for name in "qkvo"},
                    "a_proj": "decay_proj",
                    "b_proj": "beta_proj",
                    "g_proj": "gate_proj",
                    "o_norm": "norm",
                },
                mixer="D",
            ),
            *DENSE_WEIGHTS,
        ),
        spellings=(
            (".input_layernorm.", ".attention_layer_norm."),
            (".post_attention_layernorm.", ".feedforward_layer_norm."),
        ),
    )
)
