"""gpt-oss: sliding and full softmax by turns, with sinks and biases; experts with a clamped gate."""

from __future__ import annotations

from hybrid.convert import published
from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    FFN,
    LAYER,
    MIXER,
    PRE_NORMS,
    SIZES,
    attention,
    attention_bias,
    ends,
)
from hybrid.convert.family import (
    Family,
    always,
    by_type,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import Deinterleave, Transpose, rule

THEIRS = f"{LAYER}mlp."

GPT_OSS = register_family(
    Family(
        name="gpt_oss",
        architecture="GptOssForCausalLM",
        published=published.gpt_oss,
        limits=published.quantized_only,
        letters={"W": "sliding_window_attention", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention("SW"),
            attention_bias("SW"),
            always(mixers__S__sinks=True, mixers__W__sinks=True),
            key("sliding_window", "mixers.W.window"),
            key("num_local_experts", "feed_forwards.E.num_experts"),
            key("num_experts_per_tok", "feed_forwards.E.top_k"),
            key("intermediate_size", "feed_forwards.E.intermediate_size"),
            key("swiglu_alpha", "feed_forwards.E.swiglu_alpha"),
            key("swiglu_limit", "feed_forwards.E.swiglu_limit"),
            always(
                feed_forwards__E__activation="clamped_swiglu",
                feed_forwards__E__bias=True,
                feed_forwards__E__router_bias=True,
            ),
            must("hidden_act", "silu"),
            ignored("router_aux_loss_coef", "output_router_logits"),
        ),
        mixers=by_type(sliding_attention="W", full_attention="S"),
        ffn=everywhere("E"),
        weights=(
            *ends(),
            *PRE_NORMS,
            *ATTENTION_WEIGHTS,
            rule(f"{LAYER}self_attn.sinks", f"{MIXER}sinks", mixer="SW"),
            rule(f"{THEIRS}router.weight", f"{FFN}router.weight", ffn="E"),
            rule(f"{THEIRS}router.bias", f"{FFN}router.bias", ffn="E"),
            rule(
                f"{THEIRS}experts.gate_up_proj",
                f"{FFN}experts.gate_up_proj",
                Deinterleave(),
                Transpose(),
                ffn="E",
            ),
            rule(
                f"{THEIRS}experts.gate_up_proj_bias",
                f"{FFN}experts.gate_up_proj_bias",
                Deinterleave(),
                ffn="E",
            ),
            rule(f"{THEIRS}experts.down_proj", f"{FFN}experts.down_proj", Transpose(), ffn="E"),
            rule(f"{THEIRS}experts.down_proj_bias", f"{FFN}experts.down_proj_bias", ffn="E"),
        ),
    )
)
