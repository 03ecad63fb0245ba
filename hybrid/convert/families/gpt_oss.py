"""gpt-oss: alternating sliding and full softmax with sinks and biases; experts with clamped gates."""

from __future__ import annotations

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = f"{r.LAYER}mlp."

GPT_OSS = r.register_family(
    r.Family(
        name="gpt_oss",
        architecture="GptOssForCausalLM",
        published=published.gpt_oss,
        limits=published.quantized_only,
        letters={"W": "sliding_window_attention", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention("SW"),
            r.attention_bias("SW"),
            r.always(mixers__S__sinks=True, mixers__W__sinks=True),
            r.key("sliding_window", "mixers.W.window"),
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("intermediate_size", "feed_forwards.E.intermediate_size"),
            r.key("swiglu_alpha", "feed_forwards.E.swiglu_alpha"),
            r.key("swiglu_limit", "feed_forwards.E.swiglu_limit"),
            r.always(
                feed_forwards__E__activation="clamped_swiglu",
                feed_forwards__E__bias=True,
                feed_forwards__E__router_bias=True,
            ),
            r.must("hidden_act", "silu"),
            r.ignored("router_aux_loss_coef", "output_router_logits"),
        ),
        mixers=r.by_type(sliding_attention="W", full_attention="S"),
        ffn=r.everywhere("E"),
        weights=(
            *r.ends(),
            *r.PRE_NORMS,
            *r.ATTENTION_WEIGHTS,
            r.rule(f"{r.LAYER}self_attn.sinks", f"{r.MIXER}sinks", mixer="SW"),
            r.rule(f"{THEIRS}router.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(f"{THEIRS}router.bias", f"{r.FFN}router.bias", ffn="E"),
            r.rule(
                f"{THEIRS}experts.gate_up_proj",
                f"{r.FFN}experts.gate_up_proj",
                r.Deinterleave(),
                r.Transpose(),
                ffn="E",
            ),
            r.rule(
                f"{THEIRS}experts.gate_up_proj_bias",
                f"{r.FFN}experts.gate_up_proj_bias",
                r.Deinterleave(),
                ffn="E",
            ),
            r.rule(
                f"{THEIRS}experts.down_proj", f"{r.FFN}experts.down_proj", r.Transpose(), ffn="E"
            ),
            r.rule(f"{THEIRS}experts.down_proj_bias", f"{r.FFN}experts.down_proj_bias", ffn="E"),
        ),
    )
)
