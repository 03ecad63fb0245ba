"""Jamba: Mamba-1 with periodic softmax layers, periodic experts, no positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.mamba1 import mamba_options, mamba_weights


def _periodic(symbol: str, other: str, period: str, offset: str) -> r.LayerRule:
    """Relate layers ``offset``, ``offset + period``, ... to ``symbol``, all others to ``other``."""

    def read(config: Any) -> Sequence[str]:
        every, first = getattr(config, period), getattr(config, offset)
        return [symbol if i % every == first else other for i in range(config.num_hidden_layers)]

    def write(layers: Sequence[str]) -> dict[str, Any]:
        places = [i for i, found in enumerate(layers) if found == symbol]
        if not places:
            return {period: len(layers) + 1, offset: len(layers)}
        return {period: [*places, places[0] + len(layers)][1] - places[0], offset: places[0]}

    return r.LayerRule((period, offset), read, write)


JAMBA = r.register_family(
    r.Family(
        name="jamba",
        architecture="JambaForCausalLM",
        limits=published.renormalized,
        published=published.jamba,
        letters={"m": "mamba", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            r.key("num_attention_heads", "mixers.S.num_heads"),
            r.key("num_key_value_heads", "mixers.S.num_kv_heads"),
            r.key("attention_dropout", "mixers.S.dropout"),
            r.always(mixers__S__rope_parameters=None, mixers__m__inner_norm=True),
            *mamba_options(
                "mamba_d_state", "mamba_d_conv", "mamba_conv_bias", "mamba_proj_bias",
                "mamba_dt_rank", "mamba_expand",
            ),
            r.key(
                "intermediate_size",
                "feed_forwards.-.intermediate_size",
                "feed_forwards.E.intermediate_size",
            ),
            r.key("hidden_act", "feed_forwards.-.activation", "feed_forwards.E.activation",
                values=r.GATED),
            r.key("num_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.always(feed_forwards__E__normalize_weights=False),
            r.ignored("output_router_logits", "router_aux_loss_coef", "use_mamba_kernels",
                    "use_mambapy", "use_associative_scan"),
        ),
        mixers=_periodic("S", "m", "attn_layer_period", "attn_layer_offset"),
        ffn=_periodic("E", "-", "expert_layer_period", "expert_layer_offset"),
        weights=(
            *r.ends("final_layernorm"),
            *r.renames(r.LAYER, r.LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *r.renames(r.LAYER, r.LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *r.ATTENTION_WEIGHTS,
            *mamba_weights(f"{r.LAYER}mamba."),
            *(
                r.rule(f"{r.LAYER}mamba.{name}_layernorm.weight", f"{r.MIXER}inner_norms.{i}.weight")
                for i, name in enumerate(("dt", "b", "c"))
            ),
            *r.renames(f"{r.LAYER}feed_forward.", r.FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
            r.rule(f"{r.LAYER}feed_forward.router.weight", f"{r.FFN}router.weight", ffn="E"),
            *r.experts(f"{r.LAYER}feed_forward.experts."),
        ),
    )
)  # fmt: skip
