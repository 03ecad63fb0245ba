"""xLSTM 7B: one letter, a matrix memory with an exponential input gate."""

from __future__ import annotations

from typing import Any

from hybrid.convert.families.common import FFN, LAYER, MIXER, SIZES, simplest
from hybrid.convert.family import (
    Family,
    Flat,
    LayerRule,
    always,
    both,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)
from hybrid.convert.weights import renames, rule

THEIRS = "backbone.blocks.{i}."
PROJECTION, MULTIPLE = 2.667, 64


def _read_heads(config: Any) -> Flat:
    size, heads = config.hidden_size, config.num_heads
    return {
        "mixers.X.num_heads": heads,
        "mixers.X.head_dim": int(size * config.qk_dim_factor) // heads,
        "mixers.X.value_head_dim": int(size * config.v_dim_factor) // heads,
    }


def _write_heads(flat: Flat) -> Flat:
    if "mixers.X.num_heads" not in flat:
        return {}
    size, heads = flat["hidden_size"], flat["mixers.X.num_heads"]
    factors = {}
    for factor, option in (("qk_dim_factor", "head_dim"), ("v_dim_factor", "value_head_dim")):
        inner = heads * flat[f"mixers.X.{option}"]
        factors[factor] = simplest(inner / size, inner, lambda found: int(size * found))
    return {"num_heads": heads, **factors}


def _rounded(size: float, multiple: int) -> int:
    """As they round up."""
    return int((size + multiple - 1) // multiple * multiple)


def _read_width(config: Any) -> Flat:
    size = config.hidden_size * config.ffn_proj_factor
    width = _rounded(size, config.ffn_round_up_to_multiple_of)
    return {"feed_forwards.-.intermediate_size": width}


def _write_width(flat: Flat) -> Flat:
    """The usual factor where that is it; else one that is exact."""
    width, size = flat.get("feed_forwards.-.intermediate_size"), flat["hidden_size"]
    if width is None or width == _rounded(size * PROJECTION, MULTIPLE):
        return {}
    factor = simplest(width / size, width, lambda found: _rounded(size * found, 1))
    return {"ffn_proj_factor": factor, "ffn_round_up_to_multiple_of": 1}


KERNELS = ("chunkwise_kernel", "sequence_kernel", "step_kernel")


def _any_kernels(config: Flat) -> Flat:
    """Without the names of kernels: their class refuses the published ones where it has them not."""
    return {name: value for name, value in config.items() if name not in KERNELS}


LEFT_OUT = ("max_position_embeddings",), ("initializer_range",), ("tie_word_embeddings",)

XLSTM = register_family(
    Family(
        name="xlstm",
        architecture="xLSTMForCausalLM",
        letters={"X": "mlstm"},
        aliases={"xlstm": _any_kernels},
        config=(
            *(found for found in SIZES if found.keys not in LEFT_OUT),
            must("tie_word_embeddings", False),  # their class does not tie
            always(tie_word_embeddings=False),
            both(
                "embedding_dim",
                read=lambda config: {},
                write=lambda flat: {"embedding_dim": flat["hidden_size"]},
            ),
            key("norm_eps"),
            key("output_logit_soft_cap", "logit_softcap"),
            both(
                *("num_heads", "qk_dim_factor", "v_dim_factor"),
                read=_read_heads,
                write=_write_heads,
            ),
            key("gate_soft_cap", "mixers.X.gate_soft_cap"),
            key("eps", "mixers.X.normalizer_eps"),
            both(
                *("ffn_proj_factor", "ffn_round_up_to_multiple_of"),
                read=_read_width,
                write=_write_width,
            ),
            must("use_bias", False),
            must("weight_mode", "single"),
            must("add_out_norm", True),
            ignored(
                "autocast_kernel_dtype", "chunk_size", "inference_state_dtype",
                "max_inference_chunksize", "mode", "norm_reduction_force_float32",
                "return_last_states", *KERNELS,
            ),
        ),
        mixers=LayerRule(
            ("num_blocks",), everywhere("X").read, lambda layers: {"num_blocks": len(layers)}
        ),
        ffn=everywhere("-"),
        weights=(
            rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
            rule("backbone.out_norm.weight", "model.norm.weight"),
            rule("lm_head.weight"),
            *renames(THEIRS, LAYER, {"norm_mlstm": "mixer_residual.norm_in"}),
            *renames(THEIRS, LAYER, {"norm_ffn": "ffn_residual.norm_in"}),
            *renames(
                f"{THEIRS}mlstm_layer.",
                MIXER,
                {
                    "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "gate_proj",
                    "igate_preact": "input_gate_proj", "fgate_preact": "forget_gate_proj",
                    "multihead_norm": "norm", "out_proj": "o_proj",
                },
                mixer="X",
            ),
            *renames(
                f"{THEIRS}ffn.",
                FFN,
                {"proj_up_gate": "gate_proj", "proj_up": "up_proj", "proj_down": "down_proj"},
                ffn="-",
            ),
        ),
    )
)  # fmt: skip
