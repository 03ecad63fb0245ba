"""flash-linear-attention's HGRN-2 (arXiv 2404.07904): layout H."""

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
    mixed,
    mixer_weights,
    short_conv,
)

OUTPUT_NORM_EPS = 1e-5  # independent of norm_eps


def _read_heads(config: Any) -> r.Flat:
    width, heads = config.expand_ratio, config.num_heads
    if width is None:
        width = config.hidden_size // heads
    else:
        heads = max(1, config.hidden_size // width)
    return {
        "mixers.H.num_heads": heads,
        "mixers.H.head_dim": width,
        "mixers.H.value_head_dim": config.hidden_size // heads,
        "mixers.H.scale": width**-0.5,
        "mixers.H.output_norm_eps": (
            None if config.norm_eps == OUTPUT_NORM_EPS else OUTPUT_NORM_EPS
        ),
    }


def _write_heads(flat: r.Flat) -> r.Flat:
    if "mixers.H.num_heads" not in flat:
        return {}
    return {"num_heads": flat["mixers.H.num_heads"], "expand_ratio": flat["mixers.H.head_dim"]}


def _read_bound(config: Any) -> r.Flat:
    bound = config.use_lower_bound
    return {"mixers.H.lower_bound": bound, "mixers.H.bounds_over_depth": bound}


HGRN2 = r.register_family(
    r.Family(
        name="hgrn2",
        architecture="HGRN2ForCausalLM",
        letters={"H": "hgrn2", **SOFTMAX},
        config=(
            *STACK,
            ATTN,
            r.both("num_heads", "expand_ratio", read=_read_heads, write=_write_heads),
            short_conv("H"),
            r.both(
                "use_lower_bound",
                read=_read_bound,
                write=lambda flat: {"use_lower_bound": flat.get("mixers.H.lower_bound", False)},
            ),
            r.must("elementwise_affine", True),
        ),
        mixers=mixed("H"),
        ffn=r.everywhere("-"),
        weights=(
            *STACK_WEIGHTS,
            *mixer_weights("H", {"g_norm": "norm.norm"}, qkv="qfi"),
            r.rule("model.lower_bounds", f"{r.MIXER}lower_bounds", mixer="H"),
        ),
        defaults={
            **DEFAULTS, **RECURRENT_DEFAULTS, "use_short_conv": False, "num_heads": None,
            "expand_ratio": 128, "use_lower_bound": True, "elementwise_affine": True,
        },
    )
)  # fmt: skip
