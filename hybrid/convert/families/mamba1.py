"""Mamba-1 under its own name and in Falcon-Mamba, which normalises what drives the scan."""

from __future__ import annotations

from hybrid.convert.families.common import LAYER, MIXER, SIZES
from hybrid.convert.family import (
    ConfigRule,
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
from hybrid.convert.weights import Rule, Squeeze, renames, rule

THEIRS = "backbone.layers.{i}."


def mamba_options(
    state: str, conv: str, conv_bias: str, bias: str, rank: str, expand: str
) -> tuple[ConfigRule, ...]:
    """Mamba's sizes under the names that a family has for them, for the letter m."""

    def write_expand(flat: Flat) -> Flat:
        if "mixers.m.inner_size" not in flat:
            return {}
        inner, outer = flat["mixers.m.inner_size"], flat["hidden_size"]
        if inner % outer:
            raise Inexpressible(
                f"mixers.m.inner_size: {inner} would have to be a multiple of hidden_size {outer}"
            )
        return {expand: inner // outer}

    return (
        key(state, "mixers.m.state_size"),
        key(conv, "mixers.m.conv_size"),
        key(conv_bias, "mixers.m.conv_bias"),
        key(bias, "mixers.m.bias"),
        key(rank, "mixers.m.dt_rank"),
        both(
            expand,
            read=lambda config: {
                "mixers.m.inner_size": getattr(config, expand) * config.hidden_size
            },
            write=write_expand,
        ),
    )


def mamba_weights(theirs: str) -> tuple[Rule, ...]:
    """Mamba's tensors below a prefix of theirs."""
    return (
        rule(f"{theirs}conv1d.weight", f"{MIXER}conv.weight", Squeeze(1), mixer="m"),
        rule(f"{theirs}conv1d.bias", f"{MIXER}conv.bias", mixer="m"),
        *renames(theirs, MIXER, {"in_proj": "in_proj", "out_proj": "o_proj"}, mixer="m"),
        *renames(theirs, MIXER, ["x_proj", "dt_proj"], mixer="m"),
        *(rule(f"{theirs}{name}", f"{MIXER}{name}", mixer="m") for name in ("A_log", "D")),
    )


def _by_width(config: Flat) -> Flat:
    """The width as published, which their class takes from `expand` alone: Falcon-Mamba-7B's says 16."""
    inner, outer = config.get("intermediate_size"), config.get("hidden_size")
    return {**config, "expand": inner // outer} if inner and outer else config


SHARED: tuple[ConfigRule, ...] = (
    *(found for found in SIZES if found.keys != ("max_position_embeddings",)),
    key("layer_norm_epsilon", "norm_eps"),
    *mamba_options(
        "state_size", "conv_kernel", "use_conv_bias", "use_bias", "time_step_rank", "expand"
    ),
    must("hidden_act", "silu"),
    key("time_step_min", "mixers.m.dt_min"),
    key("time_step_max", "mixers.m.dt_max"),
    key("time_step_floor", "mixers.m.dt_floor"),
    ignored(
        "residual_in_fp32", "rescale_prenorm_residual", "time_step_scale", "time_step_init_scheme",
        "use_mambapy", "use_associative_scan",
    ),
)  # fmt: skip

WEIGHTS: tuple[Rule, ...] = (
    rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rule("backbone.norm_f.weight", "model.norm.weight"),
    rule("lm_head.weight"),
    *renames(THEIRS, LAYER, {"norm": "mixer_residual.norm_in"}),
    *mamba_weights(f"{THEIRS}mixer."),
)

MAMBA = register_family(
    Family(
        name="mamba",
        architecture="MambaForCausalLM",
        letters={"m": "mamba"},
        aliases={"mamba": _by_width},
        config=SHARED,
        mixers=everywhere("m"),
        ffn=everywhere(""),
        weights=WEIGHTS,
    )
)
FALCON_MAMBA = register_family(
    Family(
        name="falcon_mamba",
        architecture="FalconMambaForCausalLM",
        letters={"m": "mamba"},
        aliases={"falcon_mamba": _by_width},
        config=(
            *SHARED,
            key("mixer_rms_eps", "mixers.m.inner_norm_eps"),
            always(mixers__m__inner_norm="weightless"),
        ),
        mixers=everywhere("m"),
        ffn=everywhere(""),
        weights=WEIGHTS,
    )
)
