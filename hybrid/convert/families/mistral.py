"""Mistral and Mixtral: softmax with a window or without, dense or experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    FFN,
    GATED,
    LAYER,
    PRE_NORMS,
    SIZES,
    attention,
    dense,
    ends,
    experts,
)
from hybrid.convert.families.gemma3_text import LETTERS
from hybrid.convert.family import (
    ConfigRule,
    Family,
    Flat,
    LayerRule,
    everywhere,
    ignored,
    key,
    register_family,
)
from hybrid.convert.weights import Rule, rule


def _read(config: Any) -> Sequence[str]:
    return ["S" if config.sliding_window is None else "W"] * config.num_hidden_layers


def _write(layers: Sequence[str]) -> Flat:
    return {} if "W" in layers else {"sliding_window": None}


SHARED: tuple[ConfigRule, ...] = (
    *SIZES,
    key("rms_norm_eps", "norm_eps"),
    *attention("SW"),
    key("sliding_window", "mixers.W.window"),
)
WEIGHTS: tuple[Rule, ...] = (*ends(), *PRE_NORMS, *ATTENTION_WEIGHTS)
LAYERS = LayerRule((), _read, _write)

MISTRAL = register_family(
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        limits=published.windowed("mlx-lm", "llama.cpp"),
        letters=LETTERS,
        config=(*SHARED, *dense()),
        mixers=LAYERS,
        ffn=everywhere("-"),
        weights=(*WEIGHTS, *DENSE_WEIGHTS),
    )
)
MIXTRAL = register_family(
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        limits=published.windowed("mlx-lm", "llama.cpp"),
        letters=LETTERS,
        config=(
            *SHARED,
            key("intermediate_size", "feed_forwards.E.intermediate_size"),
            key("hidden_act", "feed_forwards.E.activation", values=GATED),
            key("num_local_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            ignored("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        ),
        mixers=LAYERS,
        ffn=everywhere("E"),
        weights=(
            *WEIGHTS,
            rule(f"{LAYER}block_sparse_moe.gate.weight", f"{FFN}router.weight", ffn="E"),
            *experts(f"{LAYER}block_sparse_moe.experts.", ("w1", "w3", "w2")),
        ),
    )
)
