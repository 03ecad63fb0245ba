"""Kimi Linear: Kimi Delta Attention, latent attention without positions, experts."""

from __future__ import annotations

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.deepseek_v3 import (
    GROUPED_EXPERTS,
    LATENT,
    grouped_expert_weights,
    latent_weights,
)

THEIRS, EXPERTS = f"{r.LAYER}self_attn.", f"{r.LAYER}block_sparse_moe."


KIMI_LINEAR = r.register_family(
    r.Family(
        name="kimi_linear",
        architecture="KimiLinearForCausalLM",
        limits=published.scattered_experts,
        published=published.kimi_linear,
        # published checkpoints name the feed-forwards of dense layers differently from transformers
        filed=((r"\.block_sparse_moe\.((?:gate|up|down)_proj\.)", r".mlp.\1"),),
        letters={"K": "kimi_delta_attention", "A": "multi_head_latent_attention"},
        config=(
            *(found for found in r.SIZES if found.keys != ("tie_word_embeddings",)),
            r.must("tie_word_embeddings", False),  # not supported by the published class
            r.always(tie_word_embeddings=False),
            r.key("rms_norm_eps", "norm_eps"),
            *LATENT,
            r.always(mixers__A__rope_parameters=None),
            r.key("linear_num_heads", "mixers.K.num_heads"),
            r.key("linear_head_dim", "mixers.K.head_dim", "mixers.K.value_head_dim",
                "mixers.K.gate_rank"),
            r.key("linear_conv_kernel_dim", "mixers.K.conv_size"),
            *GROUPED_EXPERTS,
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
        ),
        mixers=r.by_type(linear_attention="K", full_attention="A"),
        ffn=r.by_type("mlp_layer_types", dense="-", sparse="E"),
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *latent_weights(rotated=False),
            *r.renames(
                THEIRS,
                r.MIXER,
                {
                    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj",
                    "b_proj": "beta_proj", "o_norm": "norm", "f_a_proj": "decay_proj.0",
                    "f_b_proj": "decay_proj.1", "g_a_proj": "gate_proj.0", "g_b_proj": "gate_proj.1",
                },
                mixer="K",
            ),
            r.three_convolutions(THEIRS, "K"),
            r.rule(f"{THEIRS}A_log", f"{r.MIXER}A_log", r.Reshape(lambda o: (1, 1, -1, 1)), mixer="K"),
            r.rule(f"{THEIRS}dt_bias", f"{r.MIXER}dt_bias", mixer="K"),
            *r.renames(EXPERTS, r.FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
            *grouped_expert_weights(EXPERTS, ("w1", "w3", "w2")),
        ),
        # transformers writes other names for the dense layers than the published checkpoints
        spellings=((".mlp.", ".block_sparse_moe."),),
    )
)  # fmt: skip
