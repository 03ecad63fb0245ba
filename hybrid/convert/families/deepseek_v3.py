"""DeepSeek-V3, Moonlight, Kimi K2: latent attention, experts in groups after dense first layers."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.convert import published
from hybrid.convert.families.common import (
    DENSE_WEIGHTS,
    FFN,
    GATED,
    LAYER,
    MIXER,
    PRE_NORMS,
    SIZES,
    dense_first,
    ends,
    experts,
    mtp_after,
)
from hybrid.convert.family import (
    ConfigRule,
    Family,
    always,
    both,
    everywhere,
    ignored,
    key,
    must,
    register_family,
    rope,
)
from hybrid.convert.weights import DeinterleaveTail, Rule, renames, rule

# latent attention, letter A; biases and rotation are the family's own
LATENT: tuple[ConfigRule, ...] = (
    key("num_attention_heads", "mixers.A.num_heads"),
    # they have a head of keys for each of queries, whatever the config says
    both(
        "num_key_value_heads",
        read=lambda config: {},
        write=lambda flat: {"num_key_value_heads": flat.get("mixers.A.num_heads", 1)},
    ),
    key("kv_lora_rank", "mixers.A.latent_dim"),
    key("q_lora_rank", "mixers.A.query_latent_dim"),
    key("qk_nope_head_dim", "mixers.A.head_dim"),
    key("qk_rope_head_dim", "mixers.A.rope_dim"),
    key("v_head_dim", "mixers.A.value_head_dim"),
    key("attention_dropout", "mixers.A.dropout"),
    must("attention_bias", False),
    always(mixers__A__latent_norm_eps=1e-6),
    ignored("head_dim", "qk_head_dim"),
)
# experts as DeepSeek-V3 has them, but for the keys that Kimi Linear has other words for
GROUPED_EXPERTS: tuple[ConfigRule, ...] = (
    key("intermediate_size", "feed_forwards.-.intermediate_size"),
    key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
    key("hidden_act", "feed_forwards.-.activation", "feed_forwards.E.activation", values=GATED),
    key("num_experts_per_tok", "feed_forwards.E.top_k"),
    key("n_shared_experts", "feed_forwards.E.num_shared_experts"),
    key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
    key("n_group", "feed_forwards.E.num_groups"),
    key("topk_group", "feed_forwards.E.top_k_groups"),
    key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
    always(
        feed_forwards__E__score_function="sigmoid", feed_forwards__E__score_correction_bias=True
    ),
    ignored("output_router_logits", "pretraining_tp"),
)


def latent_weights(rotated: bool) -> tuple[Rule, ...]:
    """The tensors of latent attention; `rotated`: neighbours are pairs of the rotation.

    The map to the queries has another name where it starts from a latent of their own.
    """
    theirs = f"{LAYER}self_attn."
    per_head = DeinterleaveTail(lambda o: o.num_heads, lambda o: o.head_dim)
    shared = DeinterleaveTail(lambda o: 1, lambda o: o.latent_dim)
    query, latent = ((per_head,), (shared,)) if rotated else ((), ())
    return (
        *(
            rule(f"{theirs}{name}.weight", f"{MIXER}q_proj.weight", *query, mixer="A", when=when)
            for name, when in (
                ("q_proj", lambda o: o.query_latent_dim is None),
                ("q_b_proj", lambda o: o.query_latent_dim is not None),
            )
        ),
        *renames(
            theirs,
            MIXER,
            {
                "kv_a_layernorm": "kv_norm",
                "kv_b_proj": "kv_proj",
                "o_proj": "o_proj",
                "q_a_proj": "q_down_proj",
                "q_a_layernorm": "q_norm",
            },
            mixer="A",
        ),
        rule(
            f"{theirs}kv_a_proj_with_mqa.weight", f"{MIXER}kv_down_proj.weight", *latent, mixer="A"
        ),
    )


def grouped_expert_weights(
    theirs: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Router, correction, experts and shared experts below a prefix."""
    bias = "score_correction_bias"
    return (
        rule(f"{theirs}gate.weight", f"{FFN}router.weight", ffn="E"),
        rule(f"{theirs}gate.e_{bias}", f"{FFN}router.{bias}", ffn="E"),
        *experts(f"{theirs}experts.", names),
        *renames(
            f"{theirs}shared_experts.",
            f"{FFN}shared_experts.",
            ["gate_proj", "up_proj", "down_proj"],
            ffn="E",
        ),
    )


DENSE_FIRST = dense_first("first_k_dense_replace")

DEEPSEEK_V3 = register_family(
    Family(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        published=published.deepseek_v3,
        aliases={"kimi_k2": lambda config: config},
        letters={"A": "multi_head_latent_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *LATENT,
            rope("A"),
            must("rope_interleave", True),
            *GROUPED_EXPERTS,
            key("n_routed_experts", "feed_forwards.E.num_experts"),
        ),
        mixers=everywhere("A"),
        ffn=DENSE_FIRST,
        weights=(
            *ends(),
            *PRE_NORMS,
            *latent_weights(rotated=True),
            *DENSE_WEIGHTS,
            *grouped_expert_weights(f"{LAYER}mlp."),
        ),
        mtp=mtp_after(
            "AE",
            "shared_head.norm",
            copies={
                "embed_tokens.weight": "model.embed_tokens.weight",
                "shared_head.head.weight": "lm_head.weight",
            },
        ),
    )
)
