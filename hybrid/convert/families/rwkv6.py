"""flash-linear-attention's RWKV-6 (arXiv 2404.05892): layout Rc, channel mixing as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import rules as r
from hybrid.convert.families.fla import (
    ATTN,
    DEFAULTS,
    SOFTMAX,
    SOFTMAX_WEIGHTS,
    THEIRS,
    UNREAD,
    ends,
    expansion,
    mixed,
    width,
)

FFN = f"{r.LAYER}ffn."
ORDER = (0, 2, 3, 1, 4)  # theirs is r, w, k, v, g; ours r, k, v, w, g


def _read_layers(config: Any) -> Sequence[str]:
    return [letter for mixer in mixed("R").read(config) for letter in (mixer, "c")]


def _write_layers(layers: Sequence[str]) -> dict[str, Any]:
    return {"num_hidden_layers": len(layers) // 2}


def _ranks(options: Any) -> list[int]:
    return [options.shift_rank] * len(ORDER)


RWKV6 = r.register_family(
    r.Family(
        name="rwkv6",
        architecture="RWKV6ForCausalLM",
        letters={"R": "rwkv6", "c": "rwkv_channel_mix", **SOFTMAX},
        config=(
            *r.SIZES,
            r.key("norm_eps", "norm_eps", "mixers.R.norm_eps"),
            r.always(norm="layernorm"),
            r.key("norm_first", "embedding_norm"),
            r.must("norm_bias", True),
            r.must("hidden_act", "sqrelu"),
            ATTN,
            *expansion("R"),
            r.key("proj_low_rank_dim", "mixers.R.shift_rank"),
            r.key("gate_low_rank_dim", "mixers.R.decay_rank"),
            width("mixers.c.intermediate_size", 3.5, 1, 32),
            UNREAD,
        ),
        mixers=r.LayerRule(("attn",), _read_layers, _write_layers),
        ffn=r.LayerRule((), lambda config: [""] * 2 * config.num_hidden_layers, lambda layers: {}),
        joins_next="RSW",
        weights=(
            *ends(),
            *r.renames("model.layers.0.", "model.", {"pre_norm": "embed_norm"}),
            *r.renames(r.LAYER, r.LAYER, {"attn_norm": "mixer_residual.norm_in"}, mixer="RSW"),
            *r.renames(r.LAYER, r.LAYER, {"ffn_norm": "mixer_residual.norm_in"}, mixer="c"),
            *SOFTMAX_WEIGHTS,
            r.rule(f"{THEIRS}x_proj.0.mu", f"{r.MIXER}shift_base", mixer="R"),
            r.rule(
                f"{THEIRS}x_proj.0.linear.weight",
                f"{r.MIXER}shift_down.weight",
                r.Reorder(_ranks, ORDER),
                mixer="R",
            ),
            r.rule(
                f"{THEIRS}x_proj.2.weight",
                f"{r.MIXER}shift_up",
                r.Transpose(),
                r.Reorder(_ranks, ORDER),
                r.Reshape(lambda options: (sum(_ranks(options)), -1)),
                mixer="R",
            ),
            r.rule(
                f"{THEIRS}x_bias",
                f"{r.MIXER}shift",
                r.Reorder(lambda options: [1] * 5, ORDER),
                mixer="R",
            ),
            *r.renames(
                THEIRS,
                r.MIXER,
                {
                    "r_proj.linear": "q_proj", "k_proj.linear": "k_proj", "v_proj.linear": "v_proj",
                    "g_proj.linear": "gate_proj", "w_proj.linear.lora.0": "decay_proj.0",
                    "g_norm": "norm", "o_proj": "o_proj",
                },
                mixer="R",
            ),
            r.rule(f"{THEIRS}w_proj.linear.lora.2.weight", f"{r.MIXER}decay_proj.1.weight", mixer="R"),
            r.rule(f"{THEIRS}w_proj.linear.lora.2.bias", f"{r.MIXER}decay_base", mixer="R"),
            r.rule(f"{THEIRS}bonus", f"{r.MIXER}bonus", mixer="R"),
            *r.renames(
                FFN,
                r.MIXER,
                {"key.linear": "k_proj", "value": "v_proj", "receptance.linear": "gate_proj"},
                mixer="c",
            ),
            r.rule(f"{FFN}key.mu", f"{r.MIXER}key_shift", mixer="c"),
            r.rule(f"{FFN}receptance.mu", f"{r.MIXER}gate_shift", mixer="c"),
        ),
        defaults={
            **{k: v for k, v in DEFAULTS.items() if k not in ("fuse_swiglu", "attnres_block_size")},
            "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 3.5,
            "hidden_act": "sqrelu", "norm_eps": 1e-5, "norm_first": True, "norm_bias": True,
            "proj_low_rank_dim": 32, "gate_low_rank_dim": 64,
        },
    )
)  # fmt: skip
