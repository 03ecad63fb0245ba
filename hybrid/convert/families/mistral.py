"""Mistral and Mixtral: softmax with or without a window, dense feed-forwards or experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.gemma3_text import LETTERS


def _read(config: Any) -> Sequence[str]:
    return ["S" if config.sliding_window is None else "W"] * config.num_hidden_layers


def _write(layers: Sequence[str]) -> r.Flat:
    return {} if "W" in layers else {"sliding_window": None}


SHARED: tuple[r.ConfigRule, ...] = (
    *r.SIZES,
    r.key("rms_norm_eps", "norm_eps"),
    *r.attention("SW"),
    r.key("sliding_window", "mixers.W.window"),
)
WEIGHTS: tuple[r.Rule, ...] = (*r.ends(), *r.PRE_NORMS, *r.ATTENTION_WEIGHTS)
LAYERS = r.LayerRule((), _read, _write)

MISTRAL = r.register_family(
    r.Family(
        name="mistral",
        architecture="MistralForCausalLM",
        limits=published.windowed("mlx-lm", "llama.cpp"),
        letters=LETTERS,
        config=(*SHARED, *r.dense()),
        mixers=LAYERS,
        ffn=r.everywhere("-"),
        weights=(*WEIGHTS, *r.DENSE_WEIGHTS),
    )
)
MIXTRAL = r.register_family(
    r.Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        limits=published.windowed("mlx-lm", "llama.cpp"),
        letters=LETTERS,
        config=(
            *SHARED,
            r.key("intermediate_size", "feed_forwards.E.intermediate_size"),
            r.key("hidden_act", "feed_forwards.E.activation", values=r.GATED),
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.ignored("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        ),
        mixers=LAYERS,
        ffn=r.everywhere("E"),
        weights=(
            *WEIGHTS,
            r.rule(f"{r.LAYER}block_sparse_moe.gate.weight", f"{r.FFN}router.weight", ffn="E"),
            *r.experts(f"{r.LAYER}block_sparse_moe.experts.", ("w1", "w3", "w2")),
        ),
    )
)
