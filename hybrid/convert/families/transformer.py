"""flash-linear-attention's softmax baseline: layout S, or W with a window."""

from __future__ import annotations

from typing import Any

from hybrid.convert import rules as r
from hybrid.convert.families.fla import (
    DEFAULTS,
    SOFTMAX,
    STACK,
    STACK_WEIGHTS,
    softmax_options,
    softmax_spec,
)

KEYS = ("num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")
QK_NORM_EPS = 1e-5  # independent of norm_eps


def _letter(config: Any) -> str:
    return "S" if config.window_size is None else "W"


def _read(config: Any) -> r.Flat:
    letter = _letter(config)
    eps = None if config.norm_eps == QK_NORM_EPS else QK_NORM_EPS
    norm = {"qk_norm": "head", "qk_norm_eps": eps} if config.qk_norm else {"qk_norm": None}
    return softmax_options(letter, {name: getattr(config, name) for name in KEYS}) | {
        f"mixers.{letter}.{name}": value for name, value in norm.items()
    }


def _write(flat: r.Flat) -> r.Flat:
    letter = next((word for word in flat["letters"] if word in SOFTMAX), None)
    if letter is None:
        raise r.Inexpressible("layout: expected one softmax mixer in every layer, got another")
    return softmax_spec(letter, flat) | {"qk_norm": flat[f"mixers.{letter}.qk_norm"] is not None}


TRANSFORMER = r.register_family(
    r.Family(
        name="transformer",
        architecture="TransformerForCausalLM",
        letters=SOFTMAX,
        config=(
            *STACK,
            r.both(*KEYS, "qk_norm", read=_read, write=_write),
            r.ignored("elementwise_affine"),  # not used by the class
        ),
        mixers=r.LayerRule(
            ("window_size",),
            lambda config: [_letter(config)] * config.num_hidden_layers,
            lambda layers: {},
        ),
        ffn=r.everywhere("-"),
        weights=STACK_WEIGHTS,
        defaults={
            **{k: v for k, v in DEFAULTS.items() if k not in ("attn", "attn_mode")},
            "num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False,
            "window_size": None, "rope_theta": 10000.0, "elementwise_affine": True,
        },
    )
)  # fmt: skip
