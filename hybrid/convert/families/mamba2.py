"""Mamba-2: layout M, no feed-forwards, no positions."""

from hybrid.convert import published
from hybrid.convert.families.common import LAYER, SIZES, mamba2_options, mamba2_weights
from hybrid.convert.family import (
    Family,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import renames, rule

THEIRS = "backbone.layers.{i}."

MAMBA2 = register_family(
    Family(
        name="mamba2",
        architecture="Mamba2ForCausalLM",
        limits=published.clamped,
        published=published.mamba2,
        letters={"M": "mamba2"},
        config=(
            *(found for found in SIZES if found.keys != ("max_position_embeddings",)),
            key("layer_norm_epsilon", "norm_eps"),
            *mamba2_options(
                "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "use_conv_bias",
                "use_bias", "expand",
            ),
            must("hidden_act", "silu"),
            key("time_step_min", "mixers.M.dt_min"),
            key("time_step_max", "mixers.M.dt_max"),
            key("time_step_floor", "mixers.M.dt_floor"),
            ignored("chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_rank"),
        ),
        mixers=everywhere("M"),
        ffn=everywhere(""),
        weights=(
            rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
            rule("backbone.norm_f.weight", "model.norm.weight"),
            rule("lm_head.weight"),
            *renames(THEIRS, LAYER, {"norm": "mixer_residual.norm_in"}),
            *mamba2_weights(f"{THEIRS}mixer."),
        ),
    )
)  # fmt: skip
