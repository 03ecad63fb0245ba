"""Granite-4.0-H: Mamba-2, few softmax layers, multipliers, dense or mixture with shared expert."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

MOE = f"{r.LAYER}block_sparse_moe."


def _read_positions(config: Any) -> r.Flat:
    rope = dict(config.rope_parameters) if config.position_embedding_type == "rope" else None
    return {"mixers.S.rope_parameters": rope}


def _write_positions(flat: r.Flat) -> r.Flat:
    rope = flat.get("mixers.S.rope_parameters")
    if rope is None:
        return {"position_embedding_type": None}
    return {"position_embedding_type": "rope", "rope_parameters": rope}


def _write_scale(flat: r.Flat) -> r.Flat:
    if "mixers.S.scale" not in flat:
        return {}
    scale = flat["mixers.S.scale"]
    return {"attention_multiplier": flat["mixers.S.head_dim"] ** -0.5 if scale is None else scale}


def _read_ffn(config: Any) -> Sequence[str]:
    return ["E" if config.num_local_experts else "-"] * config.num_hidden_layers


def _write_ffn(layers: Sequence[str]) -> r.Flat:
    return {} if "E" in layers else {"num_local_experts": 0}


def _gated(symbol: str, ours: str) -> tuple[r.Rule, ...]:
    """Return the rules of the published dense feed-forward, which is also the shared expert."""
    gate_up = [f"{ours}gate_proj.weight", f"{ours}up_proj.weight"]
    return (
        r.rule(f"{r.LAYER}shared_mlp.input_linear.weight", gate_up, r.Split(), ffn=symbol),
        r.rule(f"{r.LAYER}shared_mlp.output_linear.weight", f"{ours}down_proj.weight", ffn=symbol),
    )


GRANITE = r.register_family(
    r.Family(
        name="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        limits=published.clamped,
        published=published.granite,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *(found for found in r.attention() if found.keys != ("rope_parameters",)),
            r.attention_bias(),
            r.both(
                *("position_embedding_type", "rope_parameters"),
                read=_read_positions,
                write=_write_positions,
            ),
            r.both(
                "attention_multiplier",
                read=lambda config: {"mixers.S.scale": float(config.attention_multiplier)},
                write=_write_scale,
            ),
            r.key("embedding_multiplier"),
            r.key("residual_multiplier", *[f"residuals.{s}.output_multiplier" for s in "MS-E"]),
            r.both(
                "logits_scaling",
                read=lambda config: {"logits_multiplier": 1 / config.logits_scaling},
                write=lambda flat: {"logits_scaling": 1 / flat["logits_multiplier"]},
            ),
            *r.mamba2_options(
                "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv",
                "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
            ),
            r.must("hidden_act", "silu"),
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("intermediate_size", "feed_forwards.E.intermediate_size"),
            r.key(
                "shared_intermediate_size",
                *("feed_forwards.E.shared_intermediate_size", "feed_forwards.-.intermediate_size"),
            ),
            r.always(feed_forwards__E__num_shared_experts=1),
            r.ignored("mamba_chunk_size", "output_router_logits", "router_aux_loss_coef"),
        ),
        mixers=r.by_type(linear_attention="M", full_attention="S"),
        ffn=r.LayerRule(("num_local_experts",), _read_ffn, _write_ffn),
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *r.ATTENTION_WEIGHTS,
            *r.mamba2_weights(f"{r.LAYER}mamba."),
            *_gated("-", r.FFN),
            *_gated("E", f"{r.FFN}shared_experts."),
            r.rule(f"{MOE}router.layer.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(f"{MOE}input_linear.weight", f"{r.FFN}experts.gate_up_proj", ffn="E"),
            r.rule(f"{MOE}output_linear.weight", f"{r.FFN}experts.down_proj", ffn="E"),
        ),
    )
)  # fmt: skip
