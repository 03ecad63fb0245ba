"""flash-linear-attention's Kimi Delta Attention (arXiv 2510.26692): layout K."""

from __future__ import annotations

from typing import Any

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

SAFE = -5.0  # lowest bound of log decays in the fast path of the published chunked kernel


def _read_gate(config: Any) -> r.Flat:
    if config.lower_bound is None:
        if config.safe_gate:
            raise r.Inexpressible("lower_bound: expected a number with safe_gate: True, got None")
        return {"mixers.K.decay_gate": "softplus"}
    return {"mixers.K.decay_gate": "bounded", "mixers.K.lower_bound": config.lower_bound}


def _write_gate(flat: r.Flat) -> r.Flat:
    if flat.get("mixers.K.decay_gate") != "bounded":
        return {"safe_gate": False, "lower_bound": None}
    bound = flat["mixers.K.lower_bound"]
    return {"safe_gate": bound >= SAFE, "lower_bound": bound}


KDA = r.register_family(
    r.Family(
        name="kda",
        architecture="KDAForCausalLM",
        letters={"K": "kimi_delta_attention", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            *grouped_expansion("K"),
            short_conv("K"),
            r.key("allow_neg_eigval", "mixers.K.negative_eigenvalues"),
            r.both("safe_gate", "lower_bound", read=_read_gate, write=_write_gate),
            r.always(mixers__K__gate_bias=True),
        ),
        mixers=mixed("K"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights(
                "K",
                {
                    "b_proj": "beta_proj", "o_norm": "norm", "f_proj.0": "decay_proj.0",
                    "f_proj.1": "decay_proj.1", "g_proj.0": "gate_proj.0", "g_proj.1": "gate_proj.1",
                },
            ),
            r.rule(f"{THEIRS}A_log", f"{r.MIXER}A_log", mixer="K"),
            r.rule(f"{THEIRS}dt_bias", f"{r.MIXER}dt_bias", mixer="K"),
        ),
        defaults={
            **{k: v for k, v in DEFAULTS.items() if k != "fuse_linear_cross_entropy"},
            **RECURRENT_DEFAULTS, "num_heads": 16, "num_v_heads": None, "head_dim": 128,
            "expand_v": 1.0, "allow_neg_eigval": False, "safe_gate": False, "lower_bound": None,
        },
    )
)  # fmt: skip
