"""Falcon-H1: parallel Mamba-2 and softmax attention in every layer, muP multipliers."""

from __future__ import annotations

from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

MAMBA, SOFTMAX = f"{r.MIXER}branches.0.", f"{r.MIXER}branches.1."
NO_MULTIPLIERS = [1.0] * 5


def _read_key_multiplier(config: Any) -> r.Flat:
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    # 0 while a model without softmax is tried as an export target, which is refused later
    return {"mixers.S.scale": config.key_multiplier * max(head_dim, 1) ** -0.5}


def _write_key_multiplier(flat: r.Flat) -> r.Flat:
    scale = flat.get("mixers.S.scale")
    if scale is None:
        return {"key_multiplier": 1.0}
    usual = flat["mixers.S.head_dim"] ** -0.5
    return {"key_multiplier": r.simplest(scale / usual, scale, lambda number: number * usual)}


def _read_norm(config: Any) -> r.Flat:
    order = "gated_after" if config.mamba_norm_before_gate else "gated"
    return {"mixers.M.output_norm": order if config.mamba_rms_norm else "none"}


def _write_norm(flat: r.Flat) -> r.Flat:
    norm = flat.get("mixers.M.output_norm")
    return {"mamba_rms_norm": norm != "none", "mamba_norm_before_gate": norm != "gated"}


def _read_biases(config: Any) -> r.Flat:
    if config.mamba_proj_bias != config.projectors_bias:
        raise r.Inexpressible(
            f"mamba_proj_bias: expected the value of projectors_bias, {config.projectors_bias}, got"
            f" {config.mamba_proj_bias}"
        )
    return {"mixers.M.bias": config.mamba_proj_bias}


def _write_biases(flat: r.Flat) -> r.Flat:
    return dict.fromkeys(("mamba_proj_bias", "projectors_bias"), flat.get("mixers.M.bias", False))


def _write_inner(flat: r.Flat) -> r.Flat:
    if "mixers.M.num_heads" not in flat:
        return {}
    return {"mamba_d_ssm": flat["mixers.M.num_heads"] * flat["mixers.M.head_dim"]}


def _read_parts(config: Any) -> r.Flat:
    given = list(config.ssm_multipliers)
    return {"mixers.M.projection_multipliers": None if given == NO_MULTIPLIERS else given}


def _write_parts(flat: r.Flat) -> r.Flat:
    return {"ssm_multipliers": flat.get("mixers.M.projection_multipliers") or NO_MULTIPLIERS}


def _read_mlp(config: Any) -> r.Flat:
    gate, down = config.mlp_multipliers
    return {"feed_forwards.-.gate_multiplier": gate, "residuals.-.output_multiplier": down}


def _write_mlp(flat: r.Flat) -> r.Flat:
    paths = "feed_forwards.-.gate_multiplier", "residuals.-.output_multiplier"
    return {"mlp_multipliers": [flat.get(path, 1.0) for path in paths]}


FALCON_H1 = r.register_family(
    r.Family(
        name="falcon_h1",
        architecture="FalconH1ForCausalLM",
        published=published.falcon_h1,
        limits=published.all_of(published.clamped, published.multiplied),
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.always(parallel_combine="sum"),
            *r.attention(),
            r.attention_bias(),
            *r.dense("mlp_bias"),
            # also the activation of the convolution
            r.must("hidden_act", "silu"),
            *(
                found
                for found in r.mamba2_options(
                    "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups",
                    "mamba_d_conv", "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
                )
                if found.keys not in (("mamba_proj_bias",), ("mamba_expand",))
            ),
            r.both("mamba_proj_bias", "projectors_bias", read=_read_biases, write=_write_biases),
            r.both("mamba_d_ssm", read=lambda config: {}, write=_write_inner),
            r.both("mamba_rms_norm", "mamba_norm_before_gate", read=_read_norm, write=_write_norm),
            r.key("embedding_multiplier"),
            r.key("lm_head_multiplier", "logits_multiplier"),
            r.both("key_multiplier", read=_read_key_multiplier, write=_write_key_multiplier),
            r.both("ssm_multipliers", read=_read_parts, write=_write_parts),
            r.both("mlp_multipliers", read=_read_mlp, write=_write_mlp),
            r.key("ssm_in_multiplier", "residuals.M.input_multiplier"),
            r.key("ssm_out_multiplier", "residuals.M.output_multiplier"),
            r.key("attention_in_multiplier", "residuals.S.input_multiplier"),
            r.key("attention_out_multiplier", "residuals.S.output_multiplier"),
            # without effect if mamba_d_ssm is set
            r.ignored("mamba_expand", "mamba_chunk_size", "num_logits_to_keep"),
        ),
        mixers=r.everywhere("MS"),
        ffn=r.everywhere("-"),
        weights=(
            *r.ends("final_layernorm"),
            *r.renames(r.LAYER, r.LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *r.renames(r.LAYER, r.LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *r.mamba2_weights(f"{r.LAYER}mamba.", MAMBA),
            *r.renames(
                f"{r.LAYER}self_attn.", SOFTMAX, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="S"
            ),
            *r.renames(f"{r.LAYER}feed_forward.", r.FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
        ),
    )
)  # fmt: skip
