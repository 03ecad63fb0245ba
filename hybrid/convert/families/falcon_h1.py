"""Falcon-H1: Mamba-2 and softmax attention side by side in every layer, muP's multipliers."""

from __future__ import annotations

from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    FFN,
    LAYER,
    MIXER,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
    mamba2_options,
    mamba2_weights,
    simplest,
)
from hybrid.convert.family import (
    Family,
    Flat,
    Inexpressible,
    always,
    both,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import renames

MAMBA, SOFTMAX = f"{MIXER}branches.0.", f"{MIXER}branches.1."
NO_MULTIPLIERS = [1.0] * 5


def _read_key_multiplier(config: Any) -> Flat:
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    # 0 where a narrow model without softmax is tried, which comes to nothing later
    return {"mixers.S.scale": config.key_multiplier * max(head_dim, 1) ** -0.5}


def _write_key_multiplier(flat: Flat) -> Flat:
    scale = flat.get("mixers.S.scale")
    if scale is None:
        return {"key_multiplier": 1.0}
    usual = flat["mixers.S.head_dim"] ** -0.5
    return {"key_multiplier": simplest(scale / usual, scale, lambda number: number * usual)}


def _read_norm(config: Any) -> Flat:
    order = "gated_after" if config.mamba_norm_before_gate else "gated"
    return {"mixers.M.output_norm": order if config.mamba_rms_norm else "none"}


def _write_norm(flat: Flat) -> Flat:
    norm = flat.get("mixers.M.output_norm")
    return {"mamba_rms_norm": norm != "none", "mamba_norm_before_gate": norm != "gated"}


def _read_biases(config: Any) -> Flat:
    if config.mamba_proj_bias != config.projectors_bias:
        raise Inexpressible(
            f"mamba_proj_bias: {config.mamba_proj_bias} cannot be expressed here where projectors_bias"
            f" is {config.projectors_bias}; they would have to be the same"
        )
    return {"mixers.M.bias": config.mamba_proj_bias}


def _write_biases(flat: Flat) -> Flat:
    return dict.fromkeys(("mamba_proj_bias", "projectors_bias"), flat.get("mixers.M.bias", False))


def _write_inner(flat: Flat) -> Flat:
    if "mixers.M.num_heads" not in flat:
        return {}
    return {"mamba_d_ssm": flat["mixers.M.num_heads"] * flat["mixers.M.head_dim"]}


def _read_parts(config: Any) -> Flat:
    given = list(config.ssm_multipliers)
    return {"mixers.M.projection_multipliers": None if given == NO_MULTIPLIERS else given}


def _write_parts(flat: Flat) -> Flat:
    return {"ssm_multipliers": flat.get("mixers.M.projection_multipliers") or NO_MULTIPLIERS}


def _read_mlp(config: Any) -> Flat:
    gate, down = config.mlp_multipliers
    return {"feed_forwards.-.gate_multiplier": gate, "residuals.-.output_multiplier": down}


def _write_mlp(flat: Flat) -> Flat:
    paths = "feed_forwards.-.gate_multiplier", "residuals.-.output_multiplier"
    return {"mlp_multipliers": [flat.get(path, 1.0) for path in paths]}


FALCON_H1 = register_family(
    Family(
        name="falcon_h1",
        architecture="FalconH1ForCausalLM",
        published=published.falcon_h1,
        limits=published.clamped,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            always(parallel_combine="sum"),
            *attention(),
            attention_bias(),
            *dense("mlp_bias"),
            # the convolution's activation too
            must("hidden_act", "silu"),
            *(
                found
                for found in mamba2_options(
                    "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups",
                    "mamba_d_conv", "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
                )
                if found.keys not in (("mamba_proj_bias",), ("mamba_expand",))
            ),
            both("mamba_proj_bias", "projectors_bias", read=_read_biases, write=_write_biases),
            both("mamba_d_ssm", read=lambda config: {}, write=_write_inner),
            both("mamba_rms_norm", "mamba_norm_before_gate", read=_read_norm, write=_write_norm),
            key("embedding_multiplier"),
            key("lm_head_multiplier", "logits_multiplier"),
            both("key_multiplier", read=_read_key_multiplier, write=_write_key_multiplier),
            both("ssm_multipliers", read=_read_parts, write=_write_parts),
            both("mlp_multipliers", read=_read_mlp, write=_write_mlp),
            key("ssm_in_multiplier", "residuals.M.input_multiplier"),
            key("ssm_out_multiplier", "residuals.M.output_multiplier"),
            key("attention_in_multiplier", "residuals.S.input_multiplier"),
            key("attention_out_multiplier", "residuals.S.output_multiplier"),
            # with mamba_d_ssm it says nothing
            ignored("mamba_expand", "mamba_chunk_size", "num_logits_to_keep"),
        ),
        mixers=everywhere("MS"),
        ffn=everywhere("-"),
        weights=(
            *ends("final_layernorm"),
            *renames(LAYER, LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *renames(LAYER, LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *mamba2_weights(f"{LAYER}mamba.", MAMBA),
            *renames(
                f"{LAYER}self_attn.", SOFTMAX, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="S"
            ),
            *renames(f"{LAYER}feed_forward.", FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
        ),
    )
)  # fmt: skip
