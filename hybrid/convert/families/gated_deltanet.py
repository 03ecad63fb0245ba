"""flash-linear-attention's gated DeltaNet (arXiv 2412.06464): layout D."""

from __future__ import annotations

from hybrid.convert.families.common import MIXER
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
from hybrid.convert.family import Family, everywhere, key, must, register_family
from hybrid.convert.weights import rule

GATED_DELTANET = register_family(
    Family(
        name="gated_deltanet",
        architecture="GatedDeltaNetForCausalLM",
        letters={"D": "gated_delta_net", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *grouped_expansion("D"),
            short_conv("D"),
            key("use_gate", "mixers.D.output_gate"),
            key("allow_neg_eigval", "mixers.D.negative_eigenvalues"),
            must("output_gate_activation", "swish", "silu"),
        ),
        mixers=mixed("D"),
        ffn=everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights(
                "D",
                {
                    "a_proj": "decay_proj", "b_proj": "beta_proj", "g_proj": "gate_proj",
                    "o_norm": "norm",
                },
            ),
            rule(f"{THEIRS}A_log", f"{MIXER}A_log", mixer="D"),
            rule(f"{THEIRS}dt_bias", f"{MIXER}dt_bias", mixer="D"),
        ),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "num_heads": 6, "num_v_heads": None, "head_dim": 256,
            "expand_v": 2.0, "use_gate": True, "allow_neg_eigval": False,
            "output_gate_activation": "swish", "num_hidden_layers": 21,
        },
    )
)  # fmt: skip
