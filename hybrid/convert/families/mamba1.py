"""Mamba-1 and Falcon-Mamba, which normalises the time steps, B and C of the scan."""

from __future__ import annotations

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = "backbone.layers.{i}."


def mamba_options(
    state: str, conv: str, conv_bias: str, bias: str, rank: str, expand: str
) -> tuple[r.ConfigRule, ...]:
    """Return the rules of Mamba's sizes, letter m, for the key names of a family."""

    def write_expand(flat: r.Flat) -> r.Flat:
        if "mixers.m.inner_size" not in flat:
            return {}
        inner, outer = flat["mixers.m.inner_size"], flat["hidden_size"]
        if inner % outer:
            raise r.Inexpressible(
                f"mixers.m.inner_size: expected a multiple of hidden_size {outer}, got {inner}"
            )
        return {expand: inner // outer}

    return (
        r.key(state, "mixers.m.state_size"),
        r.key(conv, "mixers.m.conv_size"),
        r.key(conv_bias, "mixers.m.conv_bias"),
        r.key(bias, "mixers.m.bias"),
        r.key(rank, "mixers.m.dt_rank"),
        r.both(
            expand,
            read=lambda config: {
                "mixers.m.inner_size": getattr(config, expand) * config.hidden_size
            },
            write=write_expand,
        ),
    )


def mamba_weights(theirs: str) -> tuple[r.Rule, ...]:
    """Return the rules of Mamba's tensors below a published prefix."""
    return (
        r.rule(f"{theirs}conv1d.weight", f"{r.MIXER}conv.weight", r.Squeeze(1), mixer="m"),
        r.rule(f"{theirs}conv1d.bias", f"{r.MIXER}conv.bias", mixer="m"),
        *r.renames(theirs, r.MIXER, {"in_proj": "in_proj", "out_proj": "o_proj"}, mixer="m"),
        *r.renames(theirs, r.MIXER, ["x_proj", "dt_proj"], mixer="m"),
        *(r.rule(f"{theirs}{name}", f"{r.MIXER}{name}", mixer="m") for name in ("A_log", "D")),
    )


def _by_width(config: r.Flat) -> r.Flat:
    """Correct ``expand``, from which the class derives the width; Falcon-Mamba-7B publishes 16."""
    inner, outer = config.get("intermediate_size"), config.get("hidden_size")
    return {**config, "expand": inner // outer} if inner and outer else config


SHARED: tuple[r.ConfigRule, ...] = (
    *(found for found in r.SIZES if found.keys != ("max_position_embeddings",)),
    r.key("layer_norm_epsilon", "norm_eps"),
    *mamba_options(
        "state_size", "conv_kernel", "use_conv_bias", "use_bias", "time_step_rank", "expand"
    ),
    r.must("hidden_act", "silu"),
    r.key("time_step_min", "mixers.m.dt_min"),
    r.key("time_step_max", "mixers.m.dt_max"),
    r.key("time_step_floor", "mixers.m.dt_floor"),
    r.ignored(
        "residual_in_fp32", "rescale_prenorm_residual", "time_step_scale", "time_step_init_scheme",
        "use_mambapy", "use_associative_scan",
    ),
)  # fmt: skip

WEIGHTS: tuple[r.Rule, ...] = (
    r.rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
    r.rule("backbone.norm_f.weight", "model.norm.weight"),
    r.rule("lm_head.weight"),
    *r.renames(THEIRS, r.LAYER, {"norm": "mixer_residual.norm_in"}),
    *mamba_weights(f"{THEIRS}mixer."),
)

MAMBA = r.register_family(
    r.Family(
        name="mamba",
        architecture="MambaForCausalLM",
        letters={"m": "mamba"},
        aliases={"mamba": _by_width},
        config=SHARED,
        mixers=r.everywhere("m"),
        ffn=r.everywhere(""),
        weights=WEIGHTS,
    )
)
FALCON_MAMBA = r.register_family(
    r.Family(
        name="falcon_mamba",
        architecture="FalconMambaForCausalLM",
        limits=published.one_epsilon,
        letters={"m": "mamba"},
        aliases={"falcon_mamba": _by_width},
        config=(
            *SHARED,
            r.key("mixer_rms_eps", "mixers.m.inner_norm_eps"),
            r.always(mixers__m__inner_norm="weightless"),
        ),
        mixers=r.everywhere("m"),
        ffn=r.everywhere(""),
        weights=WEIGHTS,
    )
)
