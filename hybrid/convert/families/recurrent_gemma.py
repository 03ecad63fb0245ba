"""RecurrentGemma: two RG-LRU layers per sliding layer, a soft cap on the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.stack import repeated

THEIRS = f"{r.LAYER}temporal_block."
TYPES = {"recurrent": "U", "attention": "W"}


def _read_layers(config: Any) -> Sequence[str]:
    count = len(config.block_types)
    return [TYPES[config.block_types[i % count]] for i in range(config.num_hidden_layers)]


def _write_layers(layers: Sequence[str]) -> r.Flat:
    kinds = {letter: kind for kind, letter in TYPES.items()}
    return {"block_types": [kinds[letter] for letter in repeated(layers)]}


def _read_embedding(config: Any) -> r.Flat:
    """Return sqrt(D) in bfloat16, independent of the dtype of the weights."""
    return {"embedding_multiplier": torch.tensor(config.hidden_size**0.5).bfloat16().item()}


POSITIONS = r.rope("W", partial=True)


def _write_positions(flat: r.Flat) -> r.Flat:
    """Write a rotary fraction of 1 explicitly, since the class defaults to one half."""
    written = POSITIONS.write(flat)
    return {name: {"partial_rotary_factor": 1.0, **found} for name, found in written.items()}


def _write_width(flat: r.Flat) -> r.Flat:
    width = flat.get("feed_forwards.-.intermediate_size")
    return {} if width is None else {"intermediate_size": 2 * width}


RECURRENT_GEMMA = r.register_family(
    r.Family(
        name="recurrent_gemma",
        architecture="RecurrentGemmaForCausalLM",
        letters={"U": "rg_lru", "W": "sliding_window_attention"},
        config=(
            *(
                found
                for found in r.SIZES
                if found.keys not in (("max_position_embeddings",), ("initializer_range",))
            ),
            r.key("rms_norm_eps", "norm_eps"),
            r.always(norm="zero_centered_rmsnorm"),
            r.both(read=_read_embedding, write=lambda flat: {}),
            r.key("logits_soft_cap", "logit_softcap"),
            r.key("num_attention_heads", "mixers.W.num_heads", "mixers.U.num_heads"),
            r.key("num_key_value_heads", "mixers.W.num_kv_heads"),
            r.key("attention_dropout", "mixers.W.dropout"),
            r.key("attention_bias", "mixers.W.bias"),
            r.always(mixers__W__output_bias=True),
            r.key("attention_window_size", "mixers.W.window"),
            replace(POSITIONS, write=_write_positions),
            r.key("lru_width", "mixers.U.width"),
            r.key("conv1d_width", "mixers.U.conv_size"),
            r.both(
                "intermediate_size",
                read=lambda config: {
                    "feed_forwards.-.intermediate_size": config.intermediate_size // 2
                },
                write=_write_width,
            ),
            r.key(
                *("hidden_activation", "feed_forwards.-.activation"),
                values={"gelu_pytorch_tanh": r.GATED["gelu_pytorch_tanh"]},
            ),
            r.always(**{"feed_forwards__-__bias": True}),
            r.ignored("w_init_variance_scale"),
        ),
        mixers=r.LayerRule(("block_types",), _read_layers, _write_layers),
        ffn=r.everywhere("-"),
        limits=published.griffin,
        weights=(
            *r.ends("final_norm"),
            *r.renames(r.LAYER, r.LAYER, {"temporal_pre_norm": "mixer_residual.norm_in"}),
            *r.renames(r.LAYER, r.LAYER, {"channel_pre_norm": "ffn_residual.norm_in"}),
            *r.renames(THEIRS, r.MIXER, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="W"),
            *r.renames(
                THEIRS,
                r.MIXER,
                {"linear_x": "x_proj", "linear_y": "gate_proj", "linear_out": "o_proj"},
                mixer="U",
            ),
            r.rule(f"{THEIRS}conv_1d.weight", f"{r.MIXER}conv.weight", r.Squeeze(1), mixer="U"),
            r.rule(f"{THEIRS}conv_1d.bias", f"{r.MIXER}conv.bias", mixer="U"),
            r.rule(f"{THEIRS}rg_lru.recurrent_param", f"{r.MIXER}decay_rate", mixer="U"),
            *(
                r.rule(f"{THEIRS}rg_lru.{theirs}_{kind}", f"{r.MIXER}{ours}.{kind}", mixer="U")
                for theirs, ours in (
                    ("input_gate", "input_gate"), ("recurrent_gate", "recurrence_gate"),
                )
                for kind in ("weight", "bias")
            ),
            *r.renames(
                f"{r.LAYER}mlp_block.", f"{r.LAYER}ffn.", ["gate_proj", "up_proj", "down_proj"], ffn="-"
            ),
        ),
    )
)  # fmt: skip
