"""flash-linear-attention's RWKV-6 (arXiv 2404.05892): layout Rc, channel mixing in its own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert.families.common import LAYER, MIXER, SIZES
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
from hybrid.convert.family import Family, LayerRule, always, key, must, register_family
from hybrid.convert.weights import Reorder, Reshape, Transpose, renames, rule

FFN = f"{LAYER}ffn."
ORDER = (0, 2, 3, 1, 4)  # theirs is r, w, k, v, g; ours r, k, v, w, g


def _read_layers(config: Any) -> Sequence[str]:
    return [letter for mixer in mixed("R").read(config) for letter in (mixer, "c")]


def _write_layers(layers: Sequence[str]) -> dict[str, Any]:
    return {"num_hidden_layers": len(layers) // 2}


def _ranks(options: Any) -> list[int]:
    return [options.shift_rank] * len(ORDER)


RWKV6 = register_family(
    Family(
        name="rwkv6",
        architecture="RWKV6ForCausalLM",
        letters={"R": "rwkv6", "c": "rwkv_channel_mix", **SOFTMAX},
        config=(
            *SIZES,
            key("norm_eps", "norm_eps", "mixers.R.norm_eps"),
            always(norm="layernorm"),
            key("norm_first", "embedding_norm"),
            must("norm_bias", True),
            must("hidden_act", "sqrelu"),
            ATTN,
            *expansion("R"),
            key("proj_low_rank_dim", "mixers.R.shift_rank"),
            key("gate_low_rank_dim", "mixers.R.decay_rank"),
            width("mixers.c.intermediate_size", 3.5, 1, 32),
            UNREAD,
        ),
        mixers=LayerRule(("attn",), _read_layers, _write_layers),
        ffn=LayerRule((), lambda config: [""] * 2 * config.num_hidden_layers, lambda layers: {}),
        joins_next="RSW",
        weights=(
            *ends(),
            *renames("model.layers.0.", "model.", {"pre_norm": "embed_norm"}),
            *renames(LAYER, LAYER, {"attn_norm": "mixer_residual.norm_in"}, mixer="RSW"),
            *renames(LAYER, LAYER, {"ffn_norm": "mixer_residual.norm_in"}, mixer="c"),
            *SOFTMAX_WEIGHTS,
            rule(f"{THEIRS}x_proj.0.mu", f"{MIXER}shift_base", mixer="R"),
            rule(
                f"{THEIRS}x_proj.0.linear.weight",
                f"{MIXER}shift_down.weight",
                Reorder(_ranks, ORDER),
                mixer="R",
            ),
            rule(
                f"{THEIRS}x_proj.2.weight",
                f"{MIXER}shift_up",
                Transpose(),
                Reorder(_ranks, ORDER),
                Reshape(lambda options: (sum(_ranks(options)), -1)),
                mixer="R",
            ),
            rule(
                f"{THEIRS}x_bias", f"{MIXER}shift", Reorder(lambda options: [1] * 5, ORDER), mixer="R"
            ),
            *renames(
                THEIRS,
                MIXER,
                {
                    "r_proj.linear": "q_proj", "k_proj.linear": "k_proj", "v_proj.linear": "v_proj",
                    "g_proj.linear": "gate_proj", "w_proj.linear.lora.0": "decay_proj.0",
                    "g_norm": "norm", "o_proj": "o_proj",
                },
                mixer="R",
            ),
            rule(f"{THEIRS}w_proj.linear.lora.2.weight", f"{MIXER}decay_proj.1.weight", mixer="R"),
            rule(f"{THEIRS}w_proj.linear.lora.2.bias", f"{MIXER}decay_base", mixer="R"),
            rule(f"{THEIRS}bonus", f"{MIXER}bonus", mixer="R"),
            *renames(
                FFN,
                MIXER,
                {"key.linear": "k_proj", "value": "v_proj", "receptance.linear": "gate_proj"},
                mixer="c",
            ),
            rule(f"{FFN}key.mu", f"{MIXER}key_shift", mixer="c"),
            rule(f"{FFN}receptance.mu", f"{MIXER}gate_shift", mixer="c"),
        ),
        defaults={
            **{k: v for k, v in DEFAULTS.items() if k not in ("fuse_swiglu", "attnres_block_size")},
            "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 3.5,
            "hidden_act": "sqrelu", "norm_eps": 1e-5, "norm_first": True, "norm_bias": True,
            "proj_low_rank_dim": 32, "gate_low_rank_dim": 64,
        },
    )
)  # fmt: skip
