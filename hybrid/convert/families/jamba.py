"""Jamba: Mamba-1 with a softmax layer every so many, experts every so many, no positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    FFN,
    GATED,
    LAYER,
    MIXER,
    SIZES,
    ends,
    experts,
)
from hybrid.convert.families.mamba1 import mamba_options, mamba_weights
from hybrid.convert.family import (
    Family,
    LayerRule,
    always,
    ignored,
    key,
    register_family,
)
from hybrid.convert.weights import renames, rule


def _periodic(symbol: str, other: str, period: str, offset: str) -> LayerRule:
    """`symbol` in layers `offset`, `offset + period`, ..., `other` in the rest."""

    def read(config: Any) -> Sequence[str]:
        every, first = getattr(config, period), getattr(config, offset)
        return [symbol if i % every == first else other for i in range(config.num_hidden_layers)]

    def write(layers: Sequence[str]) -> dict[str, Any]:
        places = [i for i, found in enumerate(layers) if found == symbol]
        if not places:
            return {period: len(layers) + 1, offset: len(layers)}
        return {period: [*places, places[0] + len(layers)][1] - places[0], offset: places[0]}

    return LayerRule((period, offset), read, write)


JAMBA = register_family(
    Family(
        name="jamba",
        architecture="JambaForCausalLM",
        limits=published.renormalized,
        published=published.jamba,
        letters={"m": "mamba", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            key("num_attention_heads", "mixers.S.num_heads"),
            key("num_key_value_heads", "mixers.S.num_kv_heads"),
            key("attention_dropout", "mixers.S.dropout"),
            always(mixers__S__rope_parameters=None, mixers__m__inner_norm=True),
            *mamba_options(
                "mamba_d_state", "mamba_d_conv", "mamba_conv_bias", "mamba_proj_bias",
                "mamba_dt_rank", "mamba_expand",
            ),
            key(
                "intermediate_size",
                "feed_forwards.-.intermediate_size",
                "feed_forwards.E.intermediate_size",
            ),
            key("hidden_act", "feed_forwards.-.activation", "feed_forwards.E.activation",
                values=GATED),
            key("num_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            always(feed_forwards__E__normalize_weights=False),
            ignored("output_router_logits", "router_aux_loss_coef", "use_mamba_kernels",
                    "use_mambapy", "use_associative_scan"),
        ),
        mixers=_periodic("S", "m", "attn_layer_period", "attn_layer_offset"),
        ffn=_periodic("E", "-", "expert_layer_period", "expert_layer_offset"),
        weights=(
            *ends("final_layernorm"),
            *renames(LAYER, LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *renames(LAYER, LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *ATTENTION_WEIGHTS,
            *mamba_weights(f"{LAYER}mamba."),
            *(
                rule(f"{LAYER}mamba.{name}_layernorm.weight", f"{MIXER}inner_norms.{i}.weight")
                for i, name in enumerate(("dt", "b", "c"))
            ),
            *renames(f"{LAYER}feed_forward.", FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
            rule(f"{LAYER}feed_forward.router.weight", f"{FFN}router.weight", ffn="E"),
            *experts(f"{LAYER}feed_forward.experts."),
        ),
    )
)  # fmt: skip
