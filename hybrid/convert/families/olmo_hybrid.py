"""OLMo Hybrid: DDDS, pre-norm in D and reordered norms in S, negative eigenvalues."""

from typing import Any

from hybrid.convert import rules as r

THEIRS = f"{r.LAYER}linear_attn."


def _channels(options: Any) -> list[int]:
    keys = options.num_key_heads * options.head_dim
    return [keys, keys, options.num_heads * options.value_head_dim]


OLMO_HYBRID = r.register_family(
    r.Family(
        name="olmo_hybrid",
        architecture="OlmoHybridForCausalLM",
        filed=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
        letters={"D": "gated_delta_net", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.always(norm_position__D="pre", norm_position__S="reordered"),
            *r.attention(nope=True),
            r.attention_bias(),
            r.always(mixers__S__qk_norm="layer"),
            *r.DELTA_NET,
            r.key("linear_allow_neg_eigval", "mixers.D.negative_eigenvalues"),
            r.always(mixers__D__output_norm_eps=1e-5),
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            r.must("hidden_act", "silu"),
            *(r.ignored(f"linear_a_log_{end}", f"linear_dt_{end}") for end in ("min", "max")),
            r.ignored("linear_dt_init_floor"),
        ),
        mixers=r.by_type(linear_attention="D", full_attention="S"),
        ffn=r.everywhere("-"),
        weights=(
            *r.ends(),
            *r.renames(
                r.LAYER,
                r.LAYER,
                {
                    "attention_layer_norm": "mixer_residual.norm_in",
                    "feedforward_layer_norm": "ffn_residual.norm_in",
                },
                mixer="D",
            ),
            *r.renames(
                r.LAYER,
                r.LAYER,
                {
                    "feedforward_layer_norm": "mixer_residual.norm_out",
                    "post_feedforward_layernorm": "ffn_residual.norm_out",
                },
                mixer="S",
            ),
            *r.ATTENTION_WEIGHTS,
            *r.QK_NORMS,
            # the published class splits the tensor into three equal parts when it saves
            r.three_convolutions(THEIRS, "D", r.Fuse(_channels, loose=True)),
            *(r.rule(THEIRS + name, r.MIXER + name, mixer="D") for name in ("A_log", "dt_bias")),
            *r.renames(
                THEIRS,
                r.MIXER,
                {
                    **{f"{name}_proj": f"{name}_proj" for name in "qkvo"},
                    "a_proj": "decay_proj",
                    "b_proj": "beta_proj",
                    "g_proj": "gate_proj",
                    "o_norm": "norm",
                },
                mixer="D",
            ),
            *r.DENSE_WEIGHTS,
        ),
        spellings=(
            (".input_layernorm.", ".attention_layer_norm."),
            (".post_attention_layernorm.", ".feedforward_layer_norm."),
        ),
    )
)
