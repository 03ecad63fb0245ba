"""flash-linear-attention's RetNet (arXiv 2307.08621): layout T."""

from __future__ import annotations

from hybrid.convert import rules as r
from hybrid.convert.families.fla import (
    ATTN,
    DEFAULTS,
    RECURRENT_DEFAULTS,
    SOFTMAX,
    STACK,
    STACK_WEIGHTS,
    expansion,
    mixed,
    mixer_weights,
    ungrouped,
)

RETNET = r.register_family(
    r.Family(
        name="retnet",
        architecture="RetNetForCausalLM",
        letters={"T": "retention", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *expansion("T"),
            ungrouped(),
            r.must("use_output_gate", True),
            r.must("feature_map", None),
            r.key(
                "elementwise_affine",
                "mixers.T.output_norm_weight",
                values={True: True, None: False, False: False},
            ),
            r.always(mixers__T__rope_theta=10000.0, mixers__T__conv_size=None),
            # the published stack does not pass these to its layers
            r.ignored("use_short_conv", "conv_size"),
        ),
        mixers=mixed("T"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights("T", {"g_proj": "gate_proj", "g_norm_swish_gate": "norm"}),
        ),
        # the name without fuse_norm; the computation is the same
        spellings=((".attn.g_norm.", ".attn.g_norm_swish_gate."),),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "use_short_conv": False, "num_heads": 8,
            "num_kv_heads": None, "expand_k": 1.0, "expand_v": 2.0, "feature_map": None,
            "use_output_gate": True, "elementwise_affine": True, "hidden_ratio": 2,
        },
    )
)  # fmt: skip
