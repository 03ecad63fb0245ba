"""flash-linear-attention's gated DeltaNet (arXiv 2412.06464): layout D."""

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
    grouped_expansion,
    mixed,
    mixer_weights,
    short_conv,
)

GATED_DELTANET = r.register_family(
    r.Family(
        name="gated_deltanet",
        architecture="GatedDeltaNetForCausalLM",
        letters={"D": "gated_delta_net", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *grouped_expansion("D"),
            short_conv("D"),
            r.key("use_gate", "mixers.D.output_gate"),
            r.key("allow_neg_eigval", "mixers.D.negative_eigenvalues"),
            r.must("output_gate_activation", "swish", "silu"),
        ),
        mixers=mixed("D"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights(
                "D",
                {
                    "a_proj": "decay_proj", "b_proj": "beta_proj", "g_proj": "gate_proj",
                    "o_norm": "norm",
                },
            ),
            r.rule(f"{THEIRS}A_log", f"{r.MIXER}A_log", mixer="D"),
            r.rule(f"{THEIRS}dt_bias", f"{r.MIXER}dt_bias", mixer="D"),
        ),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "num_heads": 6, "num_v_heads": None, "head_dim": 256,
            "expand_v": 2.0, "use_gate": True, "allow_neg_eigval": False,
            "output_gate_activation": "swish", "num_hidden_layers": 21,
        },
    )
)  # fmt: skip
