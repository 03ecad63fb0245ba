"""Ring-linear and Ling-linear 2.0: lightning attention with a softmax layer in five or eight.

transformers has no class for it: format and formulas are those of the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    DENSE_WEIGHTS,
    FFN,
    LAYER,
    MIXER,
    PRE_NORMS,
    SIZES,
    experts,
)
from hybrid.convert.families.deepseek_v3 import DENSE_FIRST
from hybrid.convert.family import (
    Family,
    Flat,
    Inexpressible,
    LayerRule,
    always,
    both,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import Split, renames, rule

THEIRS = f"{LAYER}attention."
QKV = ["q_proj", "k_proj", "v_proj"]


def read_layers(config: Any) -> Sequence[str]:
    """A softmax layer ends each group, and what is left over at the end is softmax too."""
    size, count = config.layer_group_size, config.num_hidden_layers
    whole = count // size * size
    return ["S" if (i + 1) % size == 0 or i >= whole else "L" for i in range(count)]


def _write_layers(layers: Sequence[str]) -> Flat:
    first = next((i + 1 for i, letter in enumerate(layers) if letter == "S"), len(layers) + 1)
    return {"layer_group_size": first}


def _read_heads(config: Any) -> Flat:
    heads = config.num_attention_heads
    if heads & (heads - 1):
        raise Inexpressible(
            f"num_attention_heads: {heads}, where decays can only be expressed for a power of two"
        )
    return {"mixers.S.num_heads": heads, "mixers.L.num_heads": heads}


def _write_heads(flat: Flat) -> Flat:
    found = [flat[path] for path in ("mixers.S.num_heads", "mixers.L.num_heads") if path in flat]
    return {"num_attention_heads": found[0]} if found else {}


def _read_rope(config: Any) -> Flat:
    theta, share = config.rope_theta, config.partial_rotary_factor
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    return {
        "mixers.S.rope_parameters": rope,
        "mixers.L.rope_theta": theta,
        "mixers.L.rotary_share": share,
    }


def _write_rope(flat: Flat) -> Flat:
    rope = flat.get("mixers.S.rope_parameters")
    if rope is not None:
        share = rope.get("partial_rotary_factor", 1.0)
        return {"rope_theta": rope.get("rope_theta", 1e4), "partial_rotary_factor": share}
    if "mixers.L.rope_theta" not in flat:
        return {}
    return {
        "rope_theta": flat["mixers.L.rope_theta"],
        "partial_rotary_factor": flat["mixers.L.rotary_share"],
    }


BAILING_MOE_LINEAR = register_family(
    Family(
        name="bailing_moe_linear",
        architecture="BailingMoeLinearV2ForCausalLM",
        limits=published.first_decays,
        letters={"L": "lightning_attention", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            both("num_attention_heads", read=_read_heads, write=_write_heads),
            key("num_key_value_heads", "mixers.S.num_kv_heads"),
            key(
                "head_dim",
                *("mixers.S.head_dim", "mixers.L.head_dim", "mixers.L.value_head_dim"),
            ),
            both("rope_theta", "partial_rotary_factor", read=_read_rope, write=_write_rope),
            must("rope_parameters", None),
            key("attention_dropout", "mixers.S.dropout"),
            must("use_qk_norm", True),
            must("use_qkv_bias", False),
            must("use_bias", False),
            must("use_rmsnorm", True),
            key("group_norm_size", "mixers.L.output_norm_groups"),
            key("linear_silu", "mixers.L.feature_map", values={False: "identity", True: "silu"}),
            always(
                mixers__S__qk_norm="head",
                mixers__L__qk_norm=True,
                mixers__L__scaled=True,
                mixers__L__depth_offset=-1,
            ),
            must("hidden_act", "silu"),
            key("intermediate_size", "feed_forwards.-.intermediate_size"),
            key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
            key("num_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            key("num_shared_experts", "feed_forwards.E.num_shared_experts"),
            key(
                "moe_shared_expert_intermediate_size",
                "feed_forwards.E.shared_intermediate_size",
            ),
            key("n_group", "feed_forwards.E.num_groups"),
            key("topk_group", "feed_forwards.E.top_k_groups"),
            key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
            key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
            must("score_function", "sigmoid"),
            must("moe_router_enable_expert_bias", True),
            always(
                feed_forwards__E__score_function="sigmoid",
                feed_forwards__E__score_correction_bias=True,
            ),
            ignored(
                "embedding_dropout", "output_dropout", "max_window_layers", "router_dtype",
                "output_router_logits", "num_nextn_predict_layers",
            ),
        ),
        mixers=LayerRule(("layer_group_size",), read_layers, _write_layers),
        ffn=DENSE_FIRST,
        weights=(
            rule("model.word_embeddings.weight", "model.embed_tokens.weight"),
            *renames("model.", "model.", ["norm"]),
            rule("lm_head.weight"),
            *PRE_NORMS,
            rule(
                f"{THEIRS}query_key_value.weight",
                [f"{MIXER}{name}.weight" for name in QKV],
                Split(),
                mixer="LS",
            ),
            *renames(
                THEIRS,
                MIXER,
                {"query_layernorm": "q_norm", "key_layernorm": "k_norm", "dense": "o_proj"},
                mixer="LS",
            ),
            *renames(THEIRS, MIXER, {"g_proj": "gate_proj"}, mixer="L"),
            # one group has no groups here
            rule(f"{THEIRS}g_norm.weight", f"{MIXER}norm.1.weight", mixer="L"),
            rule(f"{THEIRS}g_norm.weight", f"{MIXER}norm.norm.weight", mixer="L"),
            *DENSE_WEIGHTS,
            rule(f"{LAYER}mlp.gate.weight", f"{FFN}router.weight", ffn="E"),
            rule(f"{LAYER}mlp.gate.expert_bias", f"{FFN}router.score_correction_bias", ffn="E"),
            *experts(f"{LAYER}mlp.experts."),
            *renames(
                f"{LAYER}mlp.shared_experts.",
                f"{FFN}shared_experts.",
                ["gate_proj", "up_proj", "down_proj"],
                ffn="E",
            ),
        ),
        defaults={
            "vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120,
            "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
            "hidden_act": "silu", "use_qkv_bias": False, "use_bias": False, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02,
            "max_position_embeddings": 32768, "rope_theta": 600000.0,
            "partial_rotary_factor": 0.5, "use_qk_norm": True, "head_dim": 128,
            "pad_token_id": 156892, "eos_token_id": 156892, "bos_token_id": None,
            "num_experts": 256, "num_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
            "topk_group": 4, "moe_intermediate_size": 512, "first_k_dense_replace": 1,
            "moe_shared_expert_intermediate_size": None, "norm_topk_prob": True,
            "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
            "routed_scaling_factor": 2.5, "layer_group_size": 5, "group_norm_size": 4,
            "linear_silu": False,
        },
        notes="Decays end a layer later than MiniMax-01's, as the published code has them.",
    )
)  # fmt: skip
