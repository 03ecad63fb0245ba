"""Zamba2: Mamba-2, and shared softmax blocks that read the embeddings and feed Mamba-2 layers.

A published hybrid layer corresponds to two layers here, Z and M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

SHARED = f"{r.LAYER}shared_transformer."
ADAPTERS = "model.layers.{block}.shared_transformer."
FFN_TARGETS, SOFTMAX_TARGETS = ["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]


def _read_layers(config: Any) -> Sequence[str]:
    return list("".join({"hybrid": "ZM"}.get(kind, "M") for kind in config.layers_block_type))


def _write_layers(layers: Sequence[str]) -> r.Flat:
    text = "".join(layers)
    if "ZZ" in text or text.endswith("Z"):
        raise r.Inexpressible("layout: expected M after each Z, as in zamba2, got another layer")
    kinds = ["hybrid" if c == "Z" else "linear_attention" for c in text.replace("ZM", "Z")]
    return {"layers_block_type": kinds, "num_hidden_layers": len(kinds)}


def _read_positions(config: Any) -> r.Flat:
    rope = dict(config.rope_parameters) if config.use_mem_rope else None
    return {"mixers.Z.rope_parameters": rope}


def _write_positions(flat: r.Flat) -> r.Flat:
    rope = flat.get("mixers.Z.rope_parameters")
    return (
        {"use_mem_rope": False} if rope is None else {"use_mem_rope": True, "rope_parameters": rope}
    )


def _read_targets(config: Any) -> r.Flat:
    more = SOFTMAX_TARGETS if config.use_shared_attention_adapter else []
    return {"shared.Z.lora_targets": [*FFN_TARGETS, *more]}


def _write_targets(flat: r.Flat) -> r.Flat:
    targets = flat.get("shared.Z.lora_targets", ())
    return {"use_shared_attention_adapter": any(name in targets for name in SOFTMAX_TARGETS)}


def _mamba(theirs: str, joined: bool) -> tuple[r.Rule, ...]:
    """Return the rules of a Mamba-2 layer below a prefix, separate or after a shared block."""
    rules = (
        *r.renames(theirs, r.LAYER, {"input_layernorm": "mixer_residual.norm_in"}, mixer="M"),
        *r.mamba2_weights(f"{theirs}mamba."),
    )
    return tuple(replace(found, joined=joined) for found in rules)


ZAMBA2 = r.register_family(
    r.Family(
        name="zamba2",
        architecture="Zamba2ForCausalLM",
        limits=published.clamped_below,
        letters={"M": "mamba2", "Z": "softmax_attention"},
        config=(
            *(found for found in r.SIZES if found.keys != ("tie_word_embeddings",)),
            # without it, the published class shares no blocks
            r.must("tie_word_embeddings", True),
            r.always(tie_word_embeddings=True),
            # the norm within Mamba-2 always has this epsilon
            r.must("rms_norm_eps", 1e-5),
            r.always(norm_eps=1e-5),
            r.key("num_attention_heads", "mixers.Z.num_heads"),
            r.key("num_key_value_heads", "mixers.Z.num_kv_heads"),
            r.key("attention_dropout", "mixers.Z.dropout"),
            r.both(
                read=lambda config: {"mixers.Z.scale": (config.attention_head_dim / 2) ** -0.5},
                write=lambda flat: {},
            ),
            r.both("use_mem_rope", "rope_parameters", read=_read_positions, write=_write_positions),
            *(
                found
                for found in r.mamba2_options(
                    "n_mamba_heads", "mamba_headdim", "mamba_d_state", "mamba_ngroups",
                    "mamba_d_conv", "use_conv_bias", "add_bias_linear", "mamba_expand",
                )
                if found.keys[0] not in (
                    "mamba_headdim", "use_conv_bias", "add_bias_linear", "mamba_expand",
                    "time_step_limit",
                )
            ),
            r.mamba2_expand(
                "mamba_expand", read=lambda config: {"mixers.M.head_dim": config.mamba_headdim}
            ),
            *r.mamba2_clamp(),
            r.key("add_bias_linear", "mixers.M.bias", "feed_forwards.-.bias"),
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            r.key("hidden_act", "feed_forwards.-.activation", values=r.GATED),
            r.key("num_mem_blocks", "shared.Z.blocks"),
            r.key("adapter_rank", "shared.Z.lora_rank"),
            r.both("use_shared_attention_adapter", read=_read_targets, write=_write_targets),
            r.always(
                residuals__Z__skip_multiplier=0.0,
                shared__Z__concat_embeddings=True,
                shared__Z__depth_projection=True,
                shared__Z__output="next",
            ),
            r.ignored("use_conv_bias", "use_long_context", "chunk_size", "num_logits_to_keep",
                    "use_mamba_kernels", "use_mem_eff_path"),
        ),
        mixers=r.LayerRule(("layers_block_type",), _read_layers, _write_layers),
        ffn=r.LayerRule(
            (),
            lambda config: ["-" if letter == "Z" else "" for letter in _read_layers(config)],
            lambda layers: {},
        ),
        joins_next="Z",
        weights=(
            *r.ends("final_layernorm"),
            *_mamba(r.LAYER, joined=False),
            *_mamba(f"{r.LAYER}mamba_decoder.", joined=True),
            *r.renames(r.LAYER, r.LAYER, {"linear": "depth_projection"}, mixer="Z"),
            *r.renames(SHARED, r.LAYER, {"input_layernorm": "mixer_residual.norm_in"}, mixer="Z"),
            *r.renames(SHARED, r.LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}, mixer="Z"),
            *r.renames(
                f"{SHARED}self_attn.", r.MIXER, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="Z"
            ),
            *(
                r.rule(
                    f"{ADAPTERS}self_attn.linear_{name}_adapter_list.{{depth}}.{number}.weight",
                    f"{r.MIXER}{name}_proj.lora_{part}.weight",
                    mixer="Z",
                )
                for name in "qkv"
                for number, part in enumerate("ab")
            ),
            *(
                r.rule(
                    f"{SHARED}feed_forward.gate_up_proj.{kind}",
                    [f"{r.FFN}{name}.{kind}" for name in FFN_TARGETS],
                    r.Split(),
                    ffn="-",
                )
                for kind in ("weight", "bias")
            ),
            *r.renames(f"{SHARED}feed_forward.", r.FFN, ["down_proj"], ffn="-"),
            r.rule(
                f"{ADAPTERS}feed_forward.gate_up_proj_adapter_list.{{depth}}.0.weight",
                f"{r.FFN}gate_proj.lora_a.weight",
                ffn="-",
            ),
            r.rule(
                f"{ADAPTERS}feed_forward.gate_up_proj_adapter_list.{{depth}}.1.weight",
                [f"{r.FFN}{name}.lora_b.weight" for name in FFN_TARGETS],
                r.Split(),
                ffn="-",
            ),
        ),
        notes="Time steps are at least time_step_min, as in transformers' class.",
    )
)  # fmt: skip
