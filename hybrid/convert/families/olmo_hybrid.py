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
)
from hybrid.convert.family import (
    Family,
    Flat,
    always,
    both,
    by_type,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import Fuse, Squeeze, renames, rule

THEIRS = f"{LAYER}linear_attn."


def _channels(options: Any) -> list[int]:
    keys = options.num_key_heads * options.head_dim
    return [keys, keys, options.num_heads * options.value_head_dim]


def _read_rope(config: Any) -> Flat:
    rope = config.rope_parameters
    has = rope is not None and rope.get("rope_theta") is not None
    return {
        "mixers.S.rope_parameters": {k: rope[k] for k in rope if k != "partial_rotary_factor"}
        if has
        else None
    }


def _write_rope(flat: Flat) -> Flat:
    # without a base their class leaves positions out
    rope = flat.get("mixers.S.rope_parameters") or {"rope_type": "default", "rope_theta": None}
    return {"rope_parameters": dict(rope)}


OLMO_HYBRID = register_family(
    Family(
        name="olmo_hybrid",
        architecture="OlmoHybridForCausalLM",
        letters={"D": "gated_delta_net", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            always(norm_position__D="pre", norm_position__S="reordered"),
            *(found for found in attention() if found.keys != ("rope_parameters",)),
            both("rope_parameters", read=_read_rope, write=_write_rope),
            attention_bias(),
            always(mixers__S__qk_norm="layer"),
            *DELTA_NET,
            key("linear_allow_neg_eigval", "mixers.D.negative_eigenvalues"),
            always(mixers__D__output_norm_eps=1e-5),
            key("intermediate_size", "feed_forwards.-.intermediate_size"),
            must("hidden_act", "silu"),
            ignored(
                *("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max"),
                "linear_dt_init_floor",
            ),
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
            rule(
                [f"{THEIRS}{name}_conv1d.weight" for name in "qkv"],
                f"{MIXER}conv.weight",
                # their save cuts the three in equal parts
                Fuse(_channels, loose=True),
                Squeeze(1),
                mixer="D",
            ),
            rule(f"{THEIRS}A_log", f"{MIXER}A_log", mixer="D"),
            rule(f"{THEIRS}dt_bias", f"{MIXER}dt_bias", mixer="D"),
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
