"""Mamba-2: layout M, no feed-forwards, no positions."""

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = "backbone.layers.{i}."

MAMBA2 = r.register_family(
    r.Family(
        name="mamba2",
        architecture="Mamba2ForCausalLM",
        limits=published.clamped,
        published=published.mamba2,
        letters={"M": "mamba2"},
        config=(
            *(found for found in r.SIZES if found.keys != ("max_position_embeddings",)),
            r.key("layer_norm_epsilon", "norm_eps"),
            *r.mamba2_options(
                "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "use_conv_bias",
                "use_bias", "expand",
            ),
            r.must("hidden_act", "silu"),
            r.key("time_step_min", "mixers.M.dt_min"),
            r.key("time_step_max", "mixers.M.dt_max"),
            r.key("time_step_floor", "mixers.M.dt_floor"),
            r.ignored("chunk_size", "residual_in_fp32", "rescale_prenorm_residual", "time_step_rank"),
        ),
        mixers=r.everywhere("M"),
        ffn=r.everywhere(""),
        weights=(
            r.rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
            r.rule("backbone.norm_f.weight", "model.norm.weight"),
            r.rule("lm_head.weight"),
            *r.renames(THEIRS, r.LAYER, {"norm": "mixer_residual.norm_in"}),
            *r.mamba2_weights(f"{THEIRS}mixer."),
        ),
    )
)  # fmt: skip
