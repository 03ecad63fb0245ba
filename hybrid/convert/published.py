"""Keys of published configs that an export has in addition to transformers' own, for servers.

transformers reads several spellings of a key and writes one. Servers with their own config readers
know the published spelling. Each function takes a config as transformers writes it and returns the
keys to add. They have the same meaning, so reading them back changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Words = Mapping[str, Any]

# a time step too small to have an effect; not 0, because their classes take its logarithm
NO_CLAMP = 1e-20

FULL, LINEAR = "full_attention", "linear_attention"
LEGACY_TYPES = {LINEAR: "mamba", FULL: "attention"}
PATTERN = {LINEAR: "M", FULL: "*", "mlp": "-", "moe": "E", "mamba": "M", "attention": "*"}


def alias_words(values: Words, aliases: Mapping[str, str]) -> Words:
    """Return every alias of transformers' class: ``num_experts`` beside ``num_local_experts``."""
    return {
        alias: values[name]
        for alias, name in aliases.items()
        if name in values and alias not in values
    }


def period(values: Words) -> int | None:
    """Return the distance of full-attention layers, each the last of its group.

    None for other layouts.
    """
    full = [i + 1 for i, kind in enumerate(values["layer_types"]) if kind == FULL]
    size = full[0] if full else len(values["layer_types"]) + 1
    regular = list(range(size, len(values["layer_types"]) + 1, size))
    return size if full == regular else None


def interval(values: Words) -> Words:
    """Qwen3-Next and Qwen3.5: ``full_attention_interval``, and constants of their class."""
    size = period(values)
    found = {} if size is None else {"full_attention_interval": size}
    return {**found, "attn_output_gate": True, "mamba_ssm_dtype": "float32"}


def wrap(values: Words, model_type: str) -> Words:
    """Wrap a text model as the ``text_config`` of the multimodal one (Qwen3.5)."""
    outer = ("architectures", "dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")
    found = {name: values[name] for name in outer if name in values}
    return {**found, "model_type": model_type, "text_config": dict(values)}


def sliding_pattern(values: Words) -> Words:
    """Gemma 3: ``sliding_window_pattern``."""
    size = period(values)
    return {} if size is None else {"sliding_window_pattern": size}


def nemotron_h(values: Words) -> Words:
    """Nemotron-H: the pattern string, the depth, and the other name of the norms' epsilon."""
    found = {
        "hybrid_override_pattern": "".join(PATTERN[kind] for kind in values["layers_block_type"]),
        "num_hidden_layers": len(values["layers_block_type"]),
        "rms_norm_eps": values["layer_norm_epsilon"],
        "attention_head_dim": values["head_dim"],
    }
    if values.get("num_nextn_predict_layers"):
        types = values["mtp_layers_block_type"]
        found["mtp_hybrid_override_pattern"] = "".join(PATTERN[kind] for kind in types)
    return found


def granite(values: Words) -> Words:
    """Granite: names of layers and of missing positions, and sizes of a model without experts."""
    words: dict[str, Any] = {
        "layer_types": [LEGACY_TYPES.get(kind, kind) for kind in values["layer_types"]]
    }
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
    """Jamba: a model without experts has ``num_experts: 1``."""
    if values["expert_layer_offset"] < values["num_hidden_layers"]:
        return {}
    return {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}


def lfm2(values: Words) -> Words:
    """LFM2: widths of the convolutions and of the feed-forwards."""
    width = values["hidden_size"]
    words = {"block_dim": width, "conv_dim": width, "conv_dim_out": width}
    words["full_attn_idxs"] = [i for i, kind in enumerate(values["layer_types"]) if kind == FULL]
    if values["model_type"] == "lfm2":
        words |= {"block_ff_dim": values["intermediate_size"], "block_use_swiglu": True}
    words["num_heads"] = values["num_attention_heads"]
    return words | {"block_norm_eps": values["norm_eps"], "use_pos_enc": True}


def kimi_linear(values: Words) -> Words:
    """Kimi Linear: layer indices from 1, and constants of their class."""
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
        "rope_theta": 10000.0,  # servers require a value and ignore it without positions
        "first_k_dense_replace": dense_first(values),
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
        "num_nextn_predict_layers": 0,
    }


def dense_first(values: Words) -> int:
    """Return the number of layers before the first one with experts."""
    types = values["mlp_layer_types"]
    return types.index("sparse") if "sparse" in types else len(types)


def bailing_hybrid(values: Words) -> Words:
    """Ling 3: the published class."""
    rope = values.get("rope_parameters") or {}
    return {
        "architectures": ["BailingMoeV3ForCausalLM"],
        # their class reads the size from here, and then writes another one
        "head_dim": values["linear_head_dim"],
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
    """Mamba-2: the inner width."""
    return {"intermediate_size": values["num_heads"] * values["head_dim"]}


def deepseek_v3(values: Words) -> Words:
    """DeepSeek-V3: the router's scoring function; without it servers use softmax."""
    return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}


def minimax(values: Words) -> Words:
    """MiniMax-Text-01: the published class and keys."""
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


def gpt_oss(values: Words) -> Words:
    """gpt-oss: the other name of the number of experts per token."""
    return {"experts_per_token": values["num_experts_per_tok"]}


def falcon_h1(values: Words) -> Words:
    """Falcon-H1: both halves of each layer, which transformers' class always has."""
    return {"attn_layer_indices": None, "mamba_use_mlp": True}


# What servers ignore or do not support: a written config -> one line each


def irregular(values: Words) -> list[str]:
    """Warn of layouts without a period (Qwen3-Next, Qwen3.5, Gemma 3)."""
    if period(values) is not None:
        return []
    return [
        "layer_types: a softmax layer does not end every group of equal size; transformers and vLLM"
        " read the list, SGLang, llama.cpp and mlx-lm read a period and would run another layout"
    ]


def clamped(values: Words) -> list[str]:
    """Warn of clamped time steps."""
    low, high = values.get("time_step_limit") or (0.0, None)
    # transformers writes infinity as an object, because JSON has none
    unbounded = not isinstance(high, (int, float)) or high == float("inf")
    if low <= 0 and unbounded:
        return []
    return [
        f"time_step_limit: time steps are clamped to [{low}, {'inf' if unbounded else high}]; vLLM,"
        " mlx-lm and llama.cpp do not clamp them"
    ]


def clamped_below(values: Words) -> list[str]:
    """Warn of time steps clamped from below by a value that servers use for initialisation only
    (Nemotron-H).
    """
    if values["time_step_min"] <= NO_CLAMP:
        return []
    return [
        f"time_step_min: time steps are at least {values['time_step_min']}, as in transformers' class;"
        " vLLM, mlx-lm and llama.cpp do not clamp them"
    ]


def untied(values: Words) -> list[str]:
    """Warn of an untied head (LFM2)."""
    if values["tie_word_embeddings"]:
        return []
    return ["tie_word_embeddings: False; vLLM, mlx-lm and llama.cpp tie the head all the same"]


def windowed(*servers: str) -> Callable[[Words], list[str]]:
    """Return a warning for sliding windows that some servers ignore."""

    def lines(values: Words) -> list[str]:
        window = values.get("sliding_window")
        if not window or window >= (values.get("max_position_embeddings") or float("inf")):
            return []
        verb = "attends" if len(servers) == 1 else "attend"
        return [f"sliding_window: {window}; {' and '.join(servers)} {verb} to all tokens"]

    return lines


def renormalized(values: Words) -> list[str]:
    """Warn of renormalised expert weights (Jamba)."""
    if values["expert_layer_offset"] >= values["num_hidden_layers"]:
        return []
    return ["num_experts_per_tok: mlx-lm renormalises the weights of the chosen experts"]


def scattered_experts(values: Words) -> list[str]:
    """Warn of dense feed-forwards after the first layer with experts (Kimi Linear, Ling 3)."""
    if "dense" not in values["mlp_layer_types"][dense_first(values) :]:
        return []
    return [
        "mlp_layer_types: dense feed-forwards after the first experts; servers read"
        " first_k_dense_replace, and would want experts there"
    ]


def quantized_only(values: Words) -> list[str]:
    """Warn of formats that servers require (gpt-oss)."""
    return ["mlx-lm reads gpt-oss in MXFP4 only, and exports are not quantized"]


def first_decays(values: Words) -> list[str]:
    """Warn of the decays of the first layer (Ring-linear)."""
    return ["mlx-lm gives the first layer the decays of the second, unlike the published code"]


def other_minimax(values: Words) -> list[str]:
    """Warn of another architecture with the same name (mlx-lm's ``minimax``)."""
    return ["mlx-lm's minimax is MiniMax-M2, which is another architecture"]


def multiplied(values: Words) -> list[str]:
    """Warn of multipliers of keys and values (Falcon-H1), which mlx-lm folds into other tensors."""
    keys, inputs = values["key_multiplier"], values["attention_in_multiplier"]
    if keys == inputs == 1:
        return []
    return [
        f"key_multiplier: {keys}, attention_in_multiplier: {inputs}; mlx-lm multiplies queries and keys"
        " by the second only, and values by neither"
    ]


def rounded_scale(values: Words) -> list[str]:
    """Warn of the scale of the embeddings (Gemma 3), which mlx-lm rounds to bfloat16."""
    scale = values["hidden_size"] ** 0.5
    rounded = float(torch.tensor(scale).bfloat16())
    return [] if rounded == scale else [f"embedding scale: {scale}; mlx-lm takes {rounded}"]


def own_query_scale(values: Words) -> list[str]:
    """Warn of the scale of the queries (Gemma 3), which llama.cpp takes from the width of a head."""
    scale = values["query_pre_attn_scalar"]
    if scale == values["head_dim"]:
        return []
    return [f"query_pre_attn_scalar: {scale}; llama.cpp takes head_dim, {values['head_dim']}"]


def one_epsilon(values: Words) -> list[str]:
    """Warn of the epsilon of the inner norms (Falcon-Mamba), which llama.cpp does not read."""
    inner, outer = values["mixer_rms_eps"], values["layer_norm_epsilon"]
    if inner == outer:
        return []
    return [f"mixer_rms_eps: {inner}; llama.cpp takes layer_norm_epsilon, {outer}"]


def own_factor(values: Words) -> list[str]:
    """Warn of an attention factor of YaRN, which mlx-lm computes from the other keys."""
    parameters = values.get("rope_parameters") or {}
    by_type = parameters if "full_attention" in parameters else {"": parameters}
    factors = [
        each["attention_factor"] for each in by_type.values() if each.get("attention_factor")
    ]
    return [
        f"attention_factor: {factor}; mlx-lm computes it from the factor of YaRN"
        for factor in dict.fromkeys(factors)
    ]


def griffin(values: Words) -> list[str]:
    """RecurrentGemma, which mlx-lm has with fixed values in place of several keys."""
    positions = values["rope_parameters"] or {}
    found = {
        "conv1d_width": (values["conv1d_width"], 4),
        "lru_width": (values["lru_width"] or values["hidden_size"], values["hidden_size"]),
        "num_key_value_heads": (values["num_key_value_heads"], 1),
        "attention_bias": (values["attention_bias"], False),
        "rms_norm_eps": (values["rms_norm_eps"], 1e-5),
        "rope_theta": (positions.get("rope_theta", 10000.0), 10000.0),
        "partial_rotary_factor": (positions.get("partial_rotary_factor", 0.5), 0.5),
        "embedding scale": (float(torch.tensor(values["hidden_size"] ** 0.5).bfloat16()),
                            values["hidden_size"] ** 0.5),
    }  # fmt: skip
    lines = ["vLLM, SGLang and llama.cpp do not have RecurrentGemma; mlx-lm does"]
    return lines + [
        f"{key}: {value}; mlx-lm takes {fixed} whatever the config has"
        for key, (value, fixed) in found.items()
        if value != fixed
    ]


def all_of(*limits: Callable[[Words], list[str]]) -> Callable[[Words], list[str]]:
    """Return the lines of several functions."""
    return lambda values: [line for limit in limits for line in limit(values)]


def no_limits(values: Words) -> list[str]:
    """Return no lines, for a family that every server supports."""
    return []


def nothing(values: Words) -> Words:
    """Return no keys, for a family with the same keys in servers and transformers."""
    return {}
