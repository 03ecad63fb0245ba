"""Words of published configs that an export has beside transformers' own, for servers that read them.

transformers reads several spellings of one thing and writes one; servers with config readers of their
own know the one in which the checkpoints were published. Each function takes a config as transformers
writes it and returns the keys to add. What they say is the same, so reading them back changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Words = Mapping[str, Any]

FULL, LINEAR = "full_attention", "linear_attention"
LEGACY_TYPES = {LINEAR: "mamba", FULL: "attention"}
PATTERN = {LINEAR: "M", FULL: "*", "mlp": "-", "moe": "E", "mamba": "M", "attention": "*"}


def alias_words(values: Words, aliases: Mapping[str, str]) -> Words:
    """Every alias of transformers' class: `num_experts` beside `num_local_experts`."""
    return {
        alias: values[name]
        for alias, name in aliases.items()
        if name in values and alias not in values
    }


def period(values: Words) -> int | None:
    """Distance of the full-attention layers, each the last of its group; None for other layouts."""
    full = [i + 1 for i, kind in enumerate(values["layer_types"]) if kind == FULL]
    size = full[0] if full else len(values["layer_types"]) + 1
    regular = list(range(size, len(values["layer_types"]) + 1, size))
    return size if full == regular else None


def interval(values: Words) -> Words:
    """Qwen3-Next and Qwen3.5: `full_attention_interval`."""
    size = period(values)
    return {} if size is None else {"full_attention_interval": size}


def wrap(values: Words, model_type: str) -> Words:
    """A text model as the `text_config` of the one with images (Qwen3.5)."""
    outer = ("architectures", "dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")
    found = {name: values[name] for name in outer if name in values}
    return {**found, "model_type": model_type, "text_config": dict(values)}


def sliding_pattern(values: Words) -> Words:
    """Gemma 3: `sliding_window_pattern`."""
    size = period(values)
    return {} if size is None else {"sliding_window_pattern": size}


def nemotron_h(values: Words) -> Words:
    """The pattern string, the depth, and the norms' epsilon by its other name."""
    found = {
        "hybrid_override_pattern": "".join(PATTERN[kind] for kind in values["layers_block_type"]),
        "num_hidden_layers": len(values["layers_block_type"]),
        "rms_norm_eps": values["layer_norm_epsilon"],
    }
    if values.get("num_nextn_predict_layers"):
        types = values["mtp_layers_block_type"]
        found["mtp_hybrid_override_pattern"] = "".join(PATTERN[kind] for kind in types)
    return found


def granite(values: Words) -> Words:
    """Layers and missing positions in their words, sizes of a model without experts."""
    words = {"layer_types": [LEGACY_TYPES.get(kind, kind) for kind in values["layer_types"]]}
    words["layers_block_type"] = words["layer_types"]
    if values.get("position_embedding_type") is None:
        words["position_embedding_type"] = "nope"
    if not values["num_local_experts"]:
        words |= {
            "num_experts_per_tok": 0,
            "intermediate_size": values["shared_intermediate_size"],
        }
    return words


def jamba(values: Words) -> Words:
    """A model without experts says that it has one."""
    if values["expert_layer_offset"] < values["num_hidden_layers"]:
        return {}
    return {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}


def lfm2(values: Words) -> Words:
    """Widths of the convolutions and of the feed-forwards."""
    width = values["hidden_size"]
    words = {"block_dim": width, "conv_dim": width, "conv_dim_out": width}
    words["full_attn_idxs"] = [i for i, kind in enumerate(values["layer_types"]) if kind == FULL]
    if values["model_type"] == "lfm2":
        words |= {"block_ff_dim": values["intermediate_size"], "block_use_swiglu": True}
    return words | {"block_norm_eps": values["norm_eps"], "use_pos_enc": True}


def kimi_linear(values: Words) -> Words:
    """The layers by their numbers from 1, and what their class always has."""
    layers = list(enumerate(values["layer_types"], start=1))
    return {
        "linear_attn_config": {
            "full_attn_layers": [i for i, kind in layers if kind == FULL],
            "kda_layers": [i for i, kind in layers if kind == LINEAR],
            "head_dim": values["linear_head_dim"],
            "num_heads": values["linear_num_heads"],
            "short_conv_kernel_size": values["linear_conv_kernel_dim"],
        },
        "mla_use_nope": True,
        "rope_theta": 10000.0,  # servers want one, and without positions do not use it
        "rope_scaling": None,
        "first_k_dense_replace": dense_first(values),
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
    }


def dense_first(values: Words) -> int:
    """How many layers come before the first with experts."""
    types = values["mlp_layer_types"]
    return types.index("sparse") if "sparse" in types else len(types)


def bailing_hybrid(values: Words) -> Words:
    """Ling 3 by its published class."""
    rope = values.get("rope_parameters") or {}
    return {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "no_kda_lora": True,
        "gated_attention_proj_granularity_type": "head_wise",
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": values["moe_intermediate_size"]
        * max(1, values.get("n_shared_experts") or values.get("num_shared_experts") or 1),
        "rope_interleave": True,
        **({"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else {}),
    }


def mamba2(values: Words) -> Words:
    """The inner width."""
    return {"intermediate_size": values["num_heads"] * values["head_dim"]}


def deepseek_v3(values: Words) -> Words:
    """How the router scores; servers that miss it take a softmax."""
    return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}


def minimax(values: Words) -> Words:
    """MiniMax-Text-01 by its published class and keys."""
    words = {
        f"layernorm_{theirs}_{factor}": values[f"{ours}_{factor}_factor"]
        for theirs, ours in ((FULL, "full_attn"), (LINEAR, "linear_attn"), ("mlp", "mlp"))
        for factor in ("alpha", "beta")
    }
    return {
        **words,
        "architectures": ["MiniMaxText01ForCausalLM"],
        "attn_type_list": [int(kind == FULL) for kind in values["layer_types"]],
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "rotary_dim": values.get("rotary_dim") or values["head_dim"],
    }


def nothing(values: Words) -> Words:
    """For a family whose words servers and transformers share."""
    return {}
