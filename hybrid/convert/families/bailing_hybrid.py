"""Ling 3.0: the delta rule with a bounded decay, gated latent attention, experts in groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.deepseek_v3 import GROUPED_EXPERTS, LATENT, latent_weights

THEIRS = f"{r.LAYER}attention."
MIXERS = r.by_type(linear_attention="K", full_attention="A")
FEED_FORWARDS = r.by_type("mlp_layer_types", dense="-", sparse="E")


def _write_mixers(layers: Sequence[str]) -> r.Flat:
    """Write the list of layer types, and the period that other software reads."""
    period = next((i + 1 for i, letter in enumerate(layers) if letter == "A"), len(layers) + 1)
    return {**MIXERS.write(layers), "layer_group_size": period}


def _write_ffn(layers: Sequence[str]) -> r.Flat:
    dense = next((i for i, symbol in enumerate(layers) if symbol == "E"), len(layers))
    return {**FEED_FORWARDS.write(layers), "first_k_dense_replace": dense}


def _read_gate(config: Any) -> r.Flat:
    kind = "bounded" if config.kda_safe_gate else "softplus"
    return {"mixers.K.decay_gate": kind, "mixers.K.lower_bound": config.kda_lower_bound}


def _write_gate(flat: r.Flat) -> r.Flat:
    if "mixers.K.decay_gate" not in flat:
        return {}
    return {
        "kda_safe_gate": flat["mixers.K.decay_gate"] == "bounded",
        "kda_lower_bound": flat["mixers.K.lower_bound"],
    }


def _read_head_dim(config: Any) -> r.Flat:
    paths = "mixers.K.head_dim", "mixers.K.value_head_dim"
    return dict.fromkeys(paths, config.linear_head_dim)


def _write_head_dim(flat: r.Flat) -> r.Flat:
    """Write the rotary head dim as ``head_dim``, from which the published class reads it."""
    dim = flat.get("mixers.K.head_dim")
    return {} if dim is None else {"head_dim": dim, "linear_head_dim": dim}


def latent_of_ling(found: r.Rule) -> r.Rule:
    """Return a rule of DeepSeek-V3 with the tensor names of Ling's checkpoints."""
    (name,) = found.their_names
    name = name.replace(".self_attn.", ".attention.").replace(".o_proj.", ".dense.")
    return replace(found, theirs=name)


BAILING_HYBRID = r.register_family(
    r.Family(
        name="bailing_hybrid",
        architecture="BailingHybridForCausalLM",
        limits=published.scattered_experts,
        published=published.bailing_hybrid,
        filed_whole=(".attention.o_proj.",),
        letters={"K": "kimi_delta_attention", "A": "multi_head_latent_attention"},
        config=(
            *(found for found in r.SIZES if found.keys != ("tie_word_embeddings",)),
            r.must("tie_word_embeddings", False),  # not supported by the published class
            r.always(tie_word_embeddings=False),
            r.key("rms_norm_eps", "norm_eps"),
            *(f for f in LATENT if f.keys[:1] not in (("q_lora_rank",), ("head_dim",))),
            r.must("q_lora_rank", None),  # an option of transformers' class since 5.24
            r.key("num_attention_heads", "mixers.A.num_heads", "mixers.K.num_heads"),
            r.rope("A"),
            r.always(mixers__A__output_gate=True, mixers__K__gate_rank=0),
            r.both("head_dim", read=_read_head_dim, write=_write_head_dim),
            r.key("short_conv_kernel_size", "mixers.K.conv_size"),
            r.both("kda_safe_gate", "kda_lower_bound", read=_read_gate, write=_write_gate),
            r.must("hidden_act", "silu"),
            *(found for found in GROUPED_EXPERTS if found.keys != ("hidden_act",)),
            r.key("num_local_experts", "feed_forwards.E.num_experts"),
            r.ignored("mtp_loss_scaling_factor", "rope_theta"),
        ),
        mixers=replace(MIXERS, keys=("layer_types", "layer_group_size"), write=_write_mixers),
        ffn=r.LayerRule(
            ("mlp_layer_types", "first_k_dense_replace"), FEED_FORWARDS.read, _write_ffn
        ),
        weights=(
            r.rule("model.word_embeddings.weight", "model.embed_tokens.weight"),
            *r.renames("model.", "model.", ["norm"]),
            r.rule("lm_head.weight"),
            *r.PRE_NORMS,
            *map(latent_of_ling, latent_weights(rotated=True)),
            r.rule(f"{THEIRS}g_proj.weight", f"{r.MIXER}gate_proj.weight", mixer="AK"),
            *r.renames(
                THEIRS,
                r.MIXER,
                {
                    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj",
                    "b_proj": "beta_proj", "f_proj": "decay_proj", "o_norm": "norm",
                },
                mixer="K",
            ),
            # published as ``o_proj``; transformers writes ``dense`` as in the softmax layers
            r.rule(
                f"{THEIRS}dense.weight", f"{r.MIXER}o_proj.weight", mixer="K",
                whole=f"{THEIRS}o_proj.weight",
            ),
            r.three_convolutions(THEIRS, "K"),
            *(r.rule(f"{THEIRS}{n}", f"{r.MIXER}{n}", mixer="K") for n in ("A_log", "dt_bias")),
            *r.DENSE_WEIGHTS,
            r.rule(f"{r.LAYER}mlp.gate.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(f"{r.LAYER}mlp.gate.expert_bias", f"{r.FFN}router.score_correction_bias", ffn="E"),
            *r.experts(f"{r.LAYER}mlp.experts."),
            *r.renames(
                f"{r.LAYER}mlp.shared_experts.",
                f"{r.FFN}shared_experts.",
                ["gate_proj", "up_proj", "down_proj"],
                ffn="E",
            ),
        ),
        mtp=r.mtp_after("AE", "final_layernorm"),
    )
)  # fmt: skip
