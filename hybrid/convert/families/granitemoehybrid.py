"""Granite-4.0-H: Mamba-2 with a few softmax layers, multipliers, experts with a shared one or dense."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    FFN,
    LAYER,
    PRE_NORMS,
    SIZES,
    attention,
    attention_bias,
    ends,
    mamba2_options,
    mamba2_weights,
)
from hybrid.convert.family import (
    Family,
    Flat,
    LayerRule,
    always,
    both,
    by_type,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import Rule, Split, rule

MOE = f"{LAYER}block_sparse_moe."


def _read_positions(config: Any) -> Flat:
    rope = dict(config.rope_parameters) if config.position_embedding_type == "rope" else None
    return {"mixers.S.rope_parameters": rope}


def _write_positions(flat: Flat) -> Flat:
    rope = flat.get("mixers.S.rope_parameters")
    if rope is None:
        return {"position_embedding_type": None}
    return {"position_embedding_type": "rope", "rope_parameters": rope}


def _write_scale(flat: Flat) -> Flat:
    if "mixers.S.scale" not in flat:
        return {}
    scale = flat["mixers.S.scale"]
    return {"attention_multiplier": flat["mixers.S.head_dim"] ** -0.5 if scale is None else scale}


def _read_ffn(config: Any) -> Sequence[str]:
    return ["E" if config.num_local_experts else "-"] * config.num_hidden_layers


def _write_ffn(layers: Sequence[str]) -> Flat:
    return {} if "E" in layers else {"num_local_experts": 0}


def _gated(symbol: str, ours: str) -> tuple[Rule, ...]:
    """Their dense feed-forward, which is also the shared expert."""
    gate_up = [f"{ours}gate_proj.weight", f"{ours}up_proj.weight"]
    return (
        rule(f"{LAYER}shared_mlp.input_linear.weight", gate_up, Split(), ffn=symbol),
        rule(f"{LAYER}shared_mlp.output_linear.weight", f"{ours}down_proj.weight", ffn=symbol),
    )


GRANITE = register_family(
    Family(
        name="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        limits=published.clamped,
        published=published.granite,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *(found for found in attention() if found.keys != ("rope_parameters",)),
            attention_bias(),
            both(
                *("position_embedding_type", "rope_parameters"),
                read=_read_positions,
                write=_write_positions,
            ),
            both(
                "attention_multiplier",
                read=lambda config: {"mixers.S.scale": float(config.attention_multiplier)},
                write=_write_scale,
            ),
            key("embedding_multiplier"),
            key("residual_multiplier", *[f"residuals.{s}.output_multiplier" for s in "MS-E"]),
            both(
                "logits_scaling",
                read=lambda config: {"logits_multiplier": 1 / config.logits_scaling},
                write=lambda flat: {"logits_scaling": 1 / flat["logits_multiplier"]},
            ),
            *mamba2_options(
                "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv",
                "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
            ),
            must("hidden_act", "silu"),
            key("num_local_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            key("intermediate_size", "feed_forwards.E.intermediate_size"),
            key(
                "shared_intermediate_size",
                *("feed_forwards.E.shared_intermediate_size", "feed_forwards.-.intermediate_size"),
            ),
            always(feed_forwards__E__num_shared_experts=1),
            ignored("mamba_chunk_size", "output_router_logits", "router_aux_loss_coef"),
        ),
        mixers=by_type(linear_attention="M", full_attention="S"),
        ffn=LayerRule(("num_local_experts",), _read_ffn, _write_ffn),
        weights=(
            *ends(),
            *PRE_NORMS,
            *ATTENTION_WEIGHTS,
            *mamba2_weights(f"{LAYER}mamba."),
            *_gated("-", FFN),
            *_gated("E", f"{FFN}shared_experts."),
            rule(f"{MOE}router.layer.weight", f"{FFN}router.weight", ffn="E"),
            rule(f"{MOE}input_linear.weight", f"{FFN}experts.gate_up_proj", ffn="E"),
            rule(f"{MOE}output_linear.weight", f"{FFN}experts.down_proj", ffn="E"),
        ),
    )
)  # fmt: skip
