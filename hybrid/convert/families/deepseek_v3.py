"""DeepSeek-V3, Moonlight, Kimi K2: latent attention, grouped experts after dense first layers."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.convert import published
from hybrid.convert import rules as r

# latent attention, letter A; biases and rotation depend on the family
LATENT: tuple[r.ConfigRule, ...] = (
    r.key("num_attention_heads", "mixers.A.num_heads"),
    # the number of key heads equals that of query heads, whatever the config has
    r.both(
        "num_key_value_heads",
        read=lambda config: {},
        write=lambda flat: {"num_key_value_heads": flat.get("mixers.A.num_heads", 1)},
    ),
    r.key("kv_lora_rank", "mixers.A.latent_dim"),
    r.key("q_lora_rank", "mixers.A.query_latent_dim"),
    r.key("qk_nope_head_dim", "mixers.A.head_dim"),
    r.key("qk_rope_head_dim", "mixers.A.rope_dim"),
    r.key("v_head_dim", "mixers.A.value_head_dim"),
    r.key("attention_dropout", "mixers.A.dropout"),
    r.must("attention_bias", False),
    r.always(mixers__A__latent_norm_eps=1e-6),
    r.ignored("head_dim", "qk_head_dim"),
)
# experts of DeepSeek-V3, except the keys that have other names in Kimi Linear
GROUPED_EXPERTS: tuple[r.ConfigRule, ...] = (
    r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
    r.key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
    r.key("hidden_act", "feed_forwards.-.activation", "feed_forwards.E.activation", values=r.GATED),
    r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
    r.key("n_shared_experts", "feed_forwards.E.num_shared_experts"),
    r.key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
    r.key("n_group", "feed_forwards.E.num_groups"),
    r.key("topk_group", "feed_forwards.E.top_k_groups"),
    r.key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
    r.always(
        feed_forwards__E__score_function="sigmoid", feed_forwards__E__score_correction_bias=True
    ),
    r.ignored("output_router_logits", "pretraining_tp"),
)


def latent_weights(rotated: bool) -> tuple[r.Rule, ...]:
    """Return the tensor rules of latent attention.

    Args:
        rotated: whether adjacent channels form the pairs of the rotation (interleaved).
    """
    theirs = f"{r.LAYER}self_attn."
    per_head = r.DeinterleaveTail(lambda o: o.num_heads, lambda o: o.head_dim)
    shared = r.DeinterleaveTail(lambda o: 1, lambda o: o.latent_dim)
    query, latent = ((per_head,), (shared,)) if rotated else ((), ())
    return (
        *(
            r.rule(
                f"{theirs}{name}.weight", f"{r.MIXER}q_proj.weight", *query, mixer="A", when=when
            )
            for name, when in (
                ("q_proj", lambda o: o.query_latent_dim is None),
                ("q_b_proj", lambda o: o.query_latent_dim is not None),
            )
        ),
        *r.renames(
            theirs,
            r.MIXER,
            {
                "kv_a_layernorm": "kv_norm",
                "kv_b_proj": "kv_proj",
                "o_proj": "o_proj",
                "q_a_proj": "q_down_proj",
                "q_a_layernorm": "q_norm",
            },
            mixer="A",
        ),
        r.rule(
            f"{theirs}kv_a_proj_with_mqa.weight",
            f"{r.MIXER}kv_down_proj.weight",
            *latent,
            mixer="A",
        ),
    )


def grouped_expert_weights(
    theirs: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[r.Rule, ...]:
    """Return the rules of router, correction bias, experts and shared experts below a prefix."""
    bias = "score_correction_bias"
    return (
        r.rule(f"{theirs}gate.weight", f"{r.FFN}router.weight", ffn="E"),
        r.rule(f"{theirs}gate.e_{bias}", f"{r.FFN}router.{bias}", ffn="E"),
        *r.experts(f"{theirs}experts.", names),
        *r.renames(
            f"{theirs}shared_experts.",
            f"{r.FFN}shared_experts.",
            ["gate_proj", "up_proj", "down_proj"],
            ffn="E",
        ),
    )


DENSE_FIRST = r.dense_first("first_k_dense_replace")

DEEPSEEK_V3 = r.register_family(
    r.Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        published=published.deepseek_v3,
        aliases={"kimi_k2": lambda config: config},
        letters={"A": "multi_head_latent_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *LATENT,
            r.rope("A"),
            r.must("rope_interleave", True),
            *GROUPED_EXPERTS,
            r.key("n_routed_experts", "feed_forwards.E.num_experts"),
        ),
        mixers=r.everywhere("A"),
        ffn=DENSE_FIRST,
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *latent_weights(rotated=True),
            *r.DENSE_WEIGHTS,
            *grouped_expert_weights(f"{r.LAYER}mlp."),
        ),
        mtp=r.mtp_after(
            "AE",
            "shared_head.norm",
            copies={
                "embed_tokens.weight": "model.embed_tokens.weight",
                "shared_head.head.weight": "lm_head.weight",
            },
        ),
    )
)
