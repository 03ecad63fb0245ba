"""flash-linear-attention's DeltaNet (arXiv 2406.06484): layout P."""

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
    short_conv,
)

DELTA_NET = r.register_family(
    r.Family(
        name="delta_net",
        architecture="DeltaNetForCausalLM",
        letters={"P": "delta_net", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *expansion("P"),
            short_conv("P"),
            r.key("use_gate", "mixers.P.output_gate"),
            r.key("allow_neg_eigval", "mixers.P.negative_eigenvalues"),
            r.must("use_beta", True),
            r.must("qk_norm", "l2"),
            r.must("qk_activation", "silu"),
            r.ignored("use_output_norm"),  # the layer always has this norm
        ),
        mixers=mixed("P"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights(
                "P", {"b_proj": "beta_proj", "g_proj": "gate_proj", "o_norm": "norm"}
            ),
        ),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "num_heads": 16, "expand_k": 1.0, "expand_v": 1.0,
            "use_gate": False, "allow_neg_eigval": False, "use_beta": True, "qk_norm": "l2",
            "qk_activation": "silu", "use_output_norm": True,
        },
    )
)  # fmt: skip
