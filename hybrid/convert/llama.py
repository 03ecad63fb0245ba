"""Llama and what shares its architecture (SmolLM2): layout S, pre-norm, gated feed-forwards."""

from __future__ import annotations

from typing import Any

from hybrid.convert.engine import Family, register_family

# their activation -> ours, gated
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}


def config(theirs: Any) -> dict[str, Any]:
    """LlamaConfig -> arguments of HybridConfig."""
    if theirs.hidden_act not in GATED:
        raise ValueError(f"hidden_act {theirs.hidden_act!r} has no gated feed-forward here")
    softmax = {
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": theirs.head_dim,
        "rope_parameters": dict(theirs.rope_parameters),
        "bias": theirs.attention_bias,
        "output_bias": theirs.attention_bias,
        "dropout": theirs.attention_dropout or 0.0,
    }
    dense = {
        "intermediate_size": theirs.intermediate_size,
        "activation": GATED[theirs.hidden_act],
        "bias": theirs.mlp_bias,
    }
    return {
        "layout": "S",
        "num_hidden_layers": theirs.num_hidden_layers,
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "mixers": {"S": softmax},
        "feed_forwards": {"-": dense},
        "norm_eps": theirs.rms_norm_eps,
        "initializer_range": theirs.initializer_range,
        "init": "fixed",
        "max_position_embeddings": theirs.max_position_embeddings,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "pad_token_id": theirs.pad_token_id,
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
    }


_LAYER = "model.layers.{i}."
_PROJECTIONS = [
    (f"{_LAYER}self_attn.{p}_proj.{kind}", f"{_LAYER}mixer.{p}_proj.{kind}")
    for p in "qkvo"
    for kind in ("weight", "bias")
] + [
    (f"{_LAYER}mlp.{p}_proj.{kind}", f"{_LAYER}ffn.{p}_proj.{kind}")
    for p in ("gate", "up", "down")
    for kind in ("weight", "bias")
]

LLAMA = register_family(
    Family(
        model_type="llama",
        config=config,
        names=(
            ("model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("model.norm.weight", "model.norm.weight"),
            ("lm_head.weight", "lm_head.weight"),
            (f"{_LAYER}input_layernorm.weight", f"{_LAYER}mixer_residual.norm_in.weight"),
            (f"{_LAYER}post_attention_layernorm.weight", f"{_LAYER}ffn_residual.norm_in.weight"),
            *_PROJECTIONS,
        ),
    )
)
