"""Ling and Ring 2.5: lightning attention, every eighth layer latent attention.

transformers has no class for this family. Its model type equals that of Ling 3.0; ``architectures``
differs.
"""

from __future__ import annotations

from typing import Any

from hybrid.convert import rules as r
from hybrid.convert.families.bailing_hybrid import latent_of_ling
from hybrid.convert.families.bailing_moe_linear import (
    BAILING_MOE_LINEAR,
    QKV,
    THEIRS,
    groups,
    heads,
)
from hybrid.convert.families.deepseek_v3 import LATENT, latent_weights


def _read_rope(config: Any) -> r.Flat:
    theta = config.rope_theta
    return {
        "mixers.A.rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "mixers.L.rope_theta": theta,
        "mixers.L.rotary_share": config.partial_rotary_factor,
    }


def _write_rope(flat: r.Flat) -> r.Flat:
    latent = (flat.get("mixers.A.rope_parameters") or {}).get("rope_theta")
    theta = flat.get("mixers.L.rope_theta", latent)
    share = flat.get("mixers.L.rotary_share", 0.5)
    return {} if theta is None else {"rope_theta": theta, "partial_rotary_factor": share}


# the rules of Ring-linear's config, except those of its softmax layers
OWN = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps")


def _shared(found: r.ConfigRule) -> bool:
    return bool(found.keys) and found.keys[0] not in (*OWN, "attention_dropout")


def _lightning(found: r.Rule) -> bool:
    """Whether a rule of Ring-linear also applies to this family: it does not concern a mixer."""
    return not found.mixer


CONFIG: tuple[r.ConfigRule, ...] = (
    *filter(_shared, BAILING_MOE_LINEAR.config),
    r.always(
        init="fixed",
        mixers__L__qk_norm=True,
        mixers__L__scaled=True,
        feed_forwards__E__score_function="sigmoid",
        feed_forwards__E__score_correction_bias=True,
    ),
    r.key("rms_norm_eps", "norm_eps", "mixers.A.latent_norm_eps"),
    *(
        found
        for found in LATENT
        if found.keys and found.keys[0] not in (*OWN, "attention_bias", "head_dim")
    ),
    heads("A", "num_attention_heads", "num_key_value_heads"),
    r.key("head_dim", "mixers.L.head_dim", "mixers.L.value_head_dim"),
    r.both("rope_theta", "partial_rotary_factor", read=_read_rope, write=_write_rope),
    r.must("rope_interleave", True),
)

BAILING_MOE_V2_5 = r.register_family(
    r.Family(
        name="bailing_moe_v2_5",
        model_type="bailing_hybrid",
        architecture="BailingMoeV2_5ForCausalLM",
        letters={"L": "lightning_attention", "A": "multi_head_latent_attention"},
        config=CONFIG,
        mixers=groups("A"),
        ffn=BAILING_MOE_LINEAR.ffn,
        weights=(
            *filter(_lightning, BAILING_MOE_LINEAR.weights),
            *map(latent_of_ling, latent_weights(rotated=True)),
            r.rule(
                f"{THEIRS}query_key_value.weight",
                [f"{r.MIXER}{name}.weight" for name in QKV],
                r.Split(),
                mixer="L",
            ),
            *r.renames(
                THEIRS,
                r.MIXER,
                {
                    "query_layernorm": "q_norm", "key_layernorm": "k_norm", "dense": "o_proj",
                    "g_proj": "gate_proj",
                },
                mixer="L",
            ),
            # one group is a plain norm in this package
            r.rule(f"{THEIRS}g_norm.weight", f"{r.MIXER}norm.1.weight", mixer="L"),
            r.rule(f"{THEIRS}g_norm.weight", f"{r.MIXER}norm.norm.weight", mixer="L"),
        ),
        mtp=r.mtp_after("AE", "final_layernorm"),
        defaults={
            **BAILING_MOE_LINEAR.defaults,
            "layer_group_size": 8, "q_lora_rank": None, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "rope_interleave": True, "group_norm_size": 1, "num_nextn_predict_layers": 0,
        },
        notes="Decays are those of MiniMax-01, within 1e-5 of the published ones.",
    )
)  # fmt: skip
