"""flash-linear-attention's GLA (arXiv 2312.06635): layout G, softmax in the layers of ``attn``."""

from __future__ import annotations

from hybrid.convert import rules as r
from hybrid.convert.families.fla import (
    ATTN,
    DEFAULTS,
    RECURRENT_DEFAULTS,
    SOFTMAX,
    STACK,
    STACK_WEIGHTS,
    THEIRS,
    expansion,
    mixed,
    mixer_weights,
    named_norm,
    short_conv,
    ungrouped,
)

FEATURES = {None: "identity", "swish": "silu", "silu": "silu", "relu": "relu"}

GLA = r.register_family(
    r.Family(
        name="gla",
        architecture="GLAForCausalLM",
        letters={"G": "gated_linear_attention", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *expansion("G"),
            ungrouped(),
            short_conv("G"),
            named_norm("G"),
            r.key("use_output_gate", "mixers.G.output_gate"),
            r.key("clamp_min", "mixers.G.min_log_decay"),
            r.key("feature_map", "mixers.G.feature_map", values=FEATURES),
            r.must("elementwise_affine", True),
            # fixed in the published layer, without a key
            r.always(mixers__G__gate_rank=16, mixers__G__tau=16.0, mixers__G__gate_bias=False),
            r.ignored("use_gk", "use_gv"),
        ),
        mixers=mixed("G"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights(
                "G",
                {"g_proj": "gate_proj", "gk_proj.0": "decay_proj.0", "gk_proj.1": "decay_proj.1"},
            ),
            *(
                r.rule(
                    f"{THEIRS}{name}.weight",
                    f"{r.MIXER}norm.weight",
                    mixer="G",
                    when=lambda options, gated=gated: options.output_gate == gated,
                )
                for name, gated in (("g_norm_swish_gate", True), ("g_norm", False))
            ),
        ),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "use_short_conv": False, "num_heads": 4,
            "num_kv_heads": None, "expand_k": 0.5, "expand_v": 1.0, "feature_map": None,
            "use_output_gate": True, "clamp_min": None, "elementwise_affine": True, "use_gk": True,
            "use_gv": False,
        },
    )
)  # fmt: skip
