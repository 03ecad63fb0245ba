"""Ring-linear and Ling-linear 2.0: lightning attention, every fifth or eighth layer softmax.

transformers has no class for this family: format and formulas follow the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.deepseek_v3 import DENSE_FIRST

THEIRS = f"{r.LAYER}attention."
QKV = ["q_proj", "k_proj", "v_proj"]


def groups(softmax: str) -> r.LayerRule:
    """Relate layers in groups that end in a softmax layer of this letter. Layers after the last
    complete group are softmax layers as well.
    """

    def read(config: Any) -> Sequence[str]:
        size, count = config.layer_group_size, config.num_hidden_layers
        whole = count // size * size
        return [softmax if (i + 1) % size == 0 or i >= whole else "L" for i in range(count)]

    def write(layers: Sequence[str]) -> r.Flat:
        first = next((i for i, letter in enumerate(layers, 1) if letter == softmax), None)
        return {"layer_group_size": first or len(layers) + 1}

    return r.LayerRule(("layer_group_size",), read, write)


def heads(softmax: str, *keys: str) -> r.ConfigRule:
    """Relate several published keys to one number of heads of lightning and softmax layers.

    The decays are ALiBi's slopes (arXiv 2108.12409), equal to ours only for a power of two.
    """
    paths = (f"mixers.{softmax}.num_heads", "mixers.L.num_heads")

    def read(config: Any) -> r.Flat:
        count = config.num_attention_heads
        if count & (count - 1):
            raise r.Inexpressible(
                f"num_attention_heads: expected a power of two, for the decays, got {count}"
            )
        return dict.fromkeys(paths, count)

    def write(flat: r.Flat) -> r.Flat:
        found = [flat[path] for path in paths if path in flat]
        return dict.fromkeys(keys, found[0]) if found else {}

    return r.both(*keys, read=read, write=write)


def _read_rope(config: Any) -> r.Flat:
    theta, share = config.rope_theta, config.partial_rotary_factor
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    return {
        "mixers.S.rope_parameters": rope,
        "mixers.L.rope_theta": theta,
        "mixers.L.rotary_share": share,
    }


def _write_rope(flat: r.Flat) -> r.Flat:
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


BAILING_MOE_LINEAR = r.register_family(
    r.Family(
        name="bailing_moe_linear",
        architecture="BailingMoeLinearV2ForCausalLM",
        limits=published.first_decays,
        letters={"L": "lightning_attention", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            heads("S", "num_attention_heads"),
            r.key("num_key_value_heads", "mixers.S.num_kv_heads"),
            r.key(
                "head_dim",
                *("mixers.S.head_dim", "mixers.L.head_dim", "mixers.L.value_head_dim"),
            ),
            r.both("rope_theta", "partial_rotary_factor", read=_read_rope, write=_write_rope),
            r.must("rope_parameters", None),
            r.key("attention_dropout", "mixers.S.dropout"),
            r.must("use_qk_norm", True),
            r.must("use_qkv_bias", False),
            r.must("use_bias", False),
            r.must("use_rmsnorm", True),
            r.key("group_norm_size", "mixers.L.output_norm_groups"),
            r.key("linear_silu", "mixers.L.feature_map", values={False: "identity", True: "silu"}),
            r.always(
                mixers__S__qk_norm="head",
                mixers__L__qk_norm=True,
                mixers__L__scaled=True,
                mixers__L__depth_offset=-1,
            ),
            r.must("hidden_act", "silu"),
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            r.key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
            r.key("num_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("num_shared_experts", "feed_forwards.E.num_shared_experts"),
            r.key(
                "moe_shared_expert_intermediate_size",
                "feed_forwards.E.shared_intermediate_size",
            ),
            r.key("n_group", "feed_forwards.E.num_groups"),
            r.key("topk_group", "feed_forwards.E.top_k_groups"),
            r.key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
            r.key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
            r.must("score_function", "sigmoid"),
            r.must("moe_router_enable_expert_bias", True),
            r.always(
                feed_forwards__E__score_function="sigmoid",
                feed_forwards__E__score_correction_bias=True,
            ),
            r.ignored(
                "embedding_dropout", "output_dropout", "max_window_layers", "router_dtype",
                "output_router_logits", "num_nextn_predict_layers",
            ),
        ),
        mixers=groups("S"),
        ffn=DENSE_FIRST,
        weights=(
            r.rule("model.word_embeddings.weight", "model.embed_tokens.weight"),
            *r.renames("model.", "model.", ["norm"]),
            r.rule("lm_head.weight"),
            *r.PRE_NORMS,
            r.rule(
                f"{THEIRS}query_key_value.weight",
                [f"{r.MIXER}{name}.weight" for name in QKV],
                r.Split(),
                mixer="LS",
            ),
            *r.renames(
                THEIRS,
                r.MIXER,
                {"query_layernorm": "q_norm", "key_layernorm": "k_norm", "dense": "o_proj"},
                mixer="LS",
            ),
            *r.renames(THEIRS, r.MIXER, {"g_proj": "gate_proj"}, mixer="L"),
            # one group is a plain norm in this package
            r.rule(f"{THEIRS}g_norm.weight", f"{r.MIXER}norm.1.weight", mixer="L"),
            r.rule(f"{THEIRS}g_norm.weight", f"{r.MIXER}norm.norm.weight", mixer="L"),
            *r.DENSE_WEIGHTS,
            r.rule(f"{r.LAYER}mlp.gate.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(f"{r.LAYER}mlp.gate.expert_bias", f"{r.FFN}router.score_correction_bias", ffn="E"),
            *r.experts(f"{r.LAYER}mlp.experts."),
            *r.renames(
                f"{r.LAYER}mlp.shared_experts.",
                f"{r.FFN}shared_experts.",
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
        notes="Decays end a layer later than MiniMax-01's, as in the published code.",
    )
)  # fmt: skip
