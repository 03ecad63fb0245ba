"""xLSTM 7B: mLSTM layers, a matrix memory with an exponential input gate."""

from __future__ import annotations

from typing import Any

from hybrid.convert import rules as r

THEIRS = "backbone.blocks.{i}."
PROJECTION, MULTIPLE = 2.667, 64


def _read_heads(config: Any) -> r.Flat:
    size, heads = config.hidden_size, config.num_heads
    return {
        "mixers.X.num_heads": heads,
        "mixers.X.head_dim": int(size * config.qk_dim_factor) // heads,
        "mixers.X.value_head_dim": int(size * config.v_dim_factor) // heads,
    }


def _write_heads(flat: r.Flat) -> r.Flat:
    if "mixers.X.num_heads" not in flat:
        return {}
    size, heads = flat["hidden_size"], flat["mixers.X.num_heads"]
    factors = {}
    for factor, option in (("qk_dim_factor", "head_dim"), ("v_dim_factor", "value_head_dim")):
        inner = heads * flat[f"mixers.X.{option}"]
        factors[factor] = r.simplest(inner / size, inner, lambda found: int(size * found))
    return {"num_heads": heads, **factors}


def _rounded(size: float, multiple: int) -> int:
    """Round up to a multiple, as the published class does."""
    return int((size + multiple - 1) // multiple * multiple)


def _read_width(config: Any) -> r.Flat:
    size = config.hidden_size * config.ffn_proj_factor
    width = _rounded(size, config.ffn_round_up_to_multiple_of)
    return {"feed_forwards.-.intermediate_size": width}


def _write_width(flat: r.Flat) -> r.Flat:
    """Write the default factor if it yields the width, else an exact one."""
    width, size = flat.get("feed_forwards.-.intermediate_size"), flat["hidden_size"]
    if width is None or width == _rounded(size * PROJECTION, MULTIPLE):
        return {}
    factor = r.simplest(width / size, width, lambda found: _rounded(size * found, 1))
    return {"ffn_proj_factor": factor, "ffn_round_up_to_multiple_of": 1}


KERNELS = ("chunkwise_kernel", "sequence_kernel", "step_kernel")


def _any_kernels(config: r.Flat) -> r.Flat:
    """Remove the names of kernels, which transformers' class refuses unless they are installed."""
    return {name: value for name, value in config.items() if name not in KERNELS}


LEFT_OUT = ("max_position_embeddings",), ("initializer_range",), ("tie_word_embeddings",)

XLSTM = r.register_family(
    r.Family(
        name="xlstm",
        architecture="xLSTMForCausalLM",
        letters={"X": "mlstm"},
        aliases={"xlstm": _any_kernels},
        config=(
            *(found for found in r.SIZES if found.keys not in LEFT_OUT),
            r.must("tie_word_embeddings", False),  # not supported by the published class
            r.always(tie_word_embeddings=False),
            r.both(
                "embedding_dim",
                read=lambda config: {},
                write=lambda flat: {"embedding_dim": flat["hidden_size"]},
            ),
            r.key("norm_eps"),
            r.key("output_logit_soft_cap", "logit_softcap"),
            r.both(
                *("num_heads", "qk_dim_factor", "v_dim_factor"),
                read=_read_heads,
                write=_write_heads,
            ),
            r.key("gate_soft_cap", "mixers.X.gate_soft_cap"),
            r.key("eps", "mixers.X.normalizer_eps"),
            r.both(
                *("ffn_proj_factor", "ffn_round_up_to_multiple_of"),
                read=_read_width,
                write=_write_width,
            ),
            r.must("use_bias", False),
            r.must("weight_mode", "single"),
            r.must("add_out_norm", True),
            r.ignored(
                "autocast_kernel_dtype", "chunk_size", "inference_state_dtype",
                "max_inference_chunksize", "mode", "norm_reduction_force_float32",
                "return_last_states", *KERNELS,
            ),
        ),
        mixers=r.LayerRule(
            ("num_blocks",), r.everywhere("X").read, lambda layers: {"num_blocks": len(layers)}
        ),
        ffn=r.everywhere("-"),
        weights=(
            r.rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
            r.rule("backbone.out_norm.weight", "model.norm.weight"),
            r.rule("lm_head.weight"),
            *r.renames(THEIRS, r.LAYER, {"norm_mlstm": "mixer_residual.norm_in"}),
            *r.renames(THEIRS, r.LAYER, {"norm_ffn": "ffn_residual.norm_in"}),
            *r.renames(
                f"{THEIRS}mlstm_layer.",
                r.MIXER,
                {
                    "q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "gate_proj",
                    "igate_preact": "input_gate_proj", "fgate_preact": "forget_gate_proj",
                    "multihead_norm": "norm", "out_proj": "o_proj",
                },
                mixer="X",
            ),
            *r.renames(
                f"{THEIRS}ffn.",
                r.FFN,
                {"proj_up_gate": "gate_proj", "proj_up": "up_proj", "proj_down": "down_proj"},
                ffn="-",
            ),
        ),
    )
)  # fmt: skip
