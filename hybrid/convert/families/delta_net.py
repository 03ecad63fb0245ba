"""flash-linear-attention's DeltaNet (arXiv 2406.06484): layout P."""

from __future__ import annotations

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
from hybrid.convert.family import Family, everywhere, ignored, key, must, register_family

DELTA_NET = register_family(
    Family(
        name="delta_net",
        architecture="DeltaNetForCausalLM",
        letters={"P": "delta_net", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *expansion("P"),
            short_conv("P"),
            key("use_gate", "mixers.P.output_gate"),
            key("allow_neg_eigval", "mixers.P.negative_eigenvalues"),
            must("use_beta", True),
            must("qk_norm", "l2"),
            must("qk_activation", "silu"),
            ignored("use_output_norm"),  # their layer has it whatever the key says
        ),
        mixers=mixed("P"),
        ffn=everywhere("-"),
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
