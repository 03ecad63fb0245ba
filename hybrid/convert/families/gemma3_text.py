"""Gemma 3: five sliding layers per full layer, sandwich norms, a rotary base for each kind."""

from __future__ import annotations

from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

TYPES = {"full_attention": "S", "sliding_attention": "W"}
LETTERS = {"W": "sliding_window_attention", "S": "softmax_attention"}


def _read_scale(config: Any) -> r.Flat:
    return dict.fromkeys(("mixers.S.scale", "mixers.W.scale"), config.query_pre_attn_scalar**-0.5)


def _write_scale(flat: r.Flat) -> r.Flat:
    for letter in "SW":
        if f"mixers.{letter}.scale" in flat:
            scale, dim = flat[f"mixers.{letter}.scale"], flat[f"mixers.{letter}.head_dim"]
            return {"query_pre_attn_scalar": dim if scale is None else round(scale**-2)}
    return {}


# rules shared by Gemma 2 and 3
GEMMA: tuple[r.ConfigRule, ...] = (
    *r.SIZES,
    r.key("rms_norm_eps", "norm_eps"),
    r.always(norm="zero_centered_rmsnorm", norm_position="sandwich"),
    r.always(embedding_multiplier="sqrt_hidden_size"),
    *(found for found in r.attention("SW") if found.keys != ("rope_parameters",)),
    r.attention_bias("SW"),
    r.both("query_pre_attn_scalar", read=_read_scale, write=_write_scale),
    r.key("sliding_window", "mixers.W.window"),
    r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
    r.key("hidden_activation", "feed_forwards.-.activation", values=r.GATED),
    r.key("final_logit_softcapping", "logit_softcap"),
    r.must("use_bidirectional_attention", False, None),
)
GEMMA_WEIGHTS: tuple[r.Rule, ...] = (
    *r.ends(),
    *r.renames(
        r.LAYER,
        r.LAYER,
        {
            "input_layernorm": "mixer_residual.norm_in",
            "post_attention_layernorm": "mixer_residual.norm_out",
            "pre_feedforward_layernorm": "ffn_residual.norm_in",
            "post_feedforward_layernorm": "ffn_residual.norm_out",
        },
    ),
    *r.ATTENTION_WEIGHTS,
    *r.DENSE_WEIGHTS,
)

GEMMA3 = r.register_family(
    r.Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        limits=published.all_of(
            published.irregular, published.rounded_scale, published.own_query_scale
        ),
        published=published.sliding_pattern,
        letters=LETTERS,
        config=(
            *GEMMA,
            r.rope_by_type(**TYPES),
            r.always(
                **{f"mixers__{s}__qk_norm": "head" for s in "SW"},
                **{f"mixers__{s}__qk_norm_type": "zero_centered_rmsnorm" for s in "SW"},
            ),
            # stored but not used by the class
            r.must("attn_logit_softcapping", None),
        ),
        mixers=r.by_type(**TYPES),
        ffn=r.everywhere("-"),
        weights=(*GEMMA_WEIGHTS, *r.QK_NORMS),
        legacy_rope=r.words_by_type("rope_local_base_freq"),
        # checkpoints of 4B and larger contain a vision model
        wrapped_in=("gemma3",),
        spellings=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        unread_weights=(
            *("vision_tower.*", "multi_modal_projector.*"),
            *("model.vision_tower.*", "model.multi_modal_projector.*"),
        ),
    )
)
