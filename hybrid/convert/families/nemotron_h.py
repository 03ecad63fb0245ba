"""Nemotron-H, Nemotron Nano 2, Nemotron 3: layers of one mixer or feed-forward, no positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r

THEIRS = "backbone.layers.{i}."
BLOCK = f"{THEIRS}mixer."
OURS = "model.layers.{i}."
TYPES = {"linear_attention": "M", "full_attention": "S", "mlp": "-", "moe": "E"}


def _layers(only: str) -> Any:
    def read(config: Any) -> Sequence[str]:
        symbols = [TYPES[kind] for kind in config.layers_block_type]
        return [symbol if symbol in only else "" for symbol in symbols]

    return read


def _write_layers(layers: Sequence[str]) -> r.Flat:
    kinds = {symbol: kind for kind, symbol in TYPES.items()}
    # parallel mixers do not exist in the family; the check after writing then reports a difference
    return {"layers_block_type": [kinds.get(symbol, kinds["M"]) for symbol in layers]}


def _mtp_layout(config: Any) -> str:
    layout = "".join(TYPES[kind] for kind in config.mtp_layers_block_type)
    if not {*layout} & {*"-E"}:
        raise r.Inexpressible(
            f"mtp_layers_block_type: expected a mixer and a feed-forward, got"
            f" {config.mtp_layers_block_type}"
        )
    return layout


def _write_mtp_layout(layout: str) -> r.Flat:
    types = _write_layers(list(layout))["layers_block_type"]
    return {"mtp_layers_block_type": types} if types else {}


def _read_bias(config: Any) -> r.Flat:
    if config.mlp_bias and "moe" in config.layers_block_type:
        raise r.Inexpressible(
            "mlp_bias: expected False with experts, got True, which hybrid models cannot express"
        )
    return {"feed_forwards.-.bias": config.mlp_bias}


NEMOTRON_H = r.register_family(
    r.Family(
        name="nemotron_h",
        architecture="NemotronHForCausalLM",
        limits=published.clamped_below,
        published=published.nemotron_h,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("layer_norm_epsilon", "norm_eps"),
            r.key("num_attention_heads", "mixers.S.num_heads"),
            r.key("num_key_value_heads", "mixers.S.num_kv_heads"),
            r.key("head_dim", "mixers.S.head_dim"),
            r.key("attention_dropout", "mixers.S.dropout"),
            r.must("attention_bias", False),
            r.must("sliding_window", None),
            r.always(mixers__S__rope_parameters=None),
            *(
                found
                for found in r.mamba2_options(
                    "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups",
                    "conv_kernel", "use_conv_bias", "use_bias", "expand",
                )
                if found.keys not in (("time_step_limit",), ("expand",))
            ),
            *r.mamba2_clamp(),
            r.must("mamba_hidden_act", "silu"),
            r.key("intermediate_size", "feed_forwards.-.intermediate_size"),
            r.both(
                "mlp_bias",
                read=_read_bias,
                write=lambda flat: {"mlp_bias": flat.get("feed_forwards.-.bias", False)},
            ),
            r.key(
                *("mlp_hidden_act", "feed_forwards.-.activation", "feed_forwards.E.activation"),
                values=r.PLAIN,
            ),
            r.key("n_routed_experts", "feed_forwards.E.num_experts"),
            r.key("num_experts_per_tok", "feed_forwards.E.top_k"),
            r.key("moe_intermediate_size", "feed_forwards.E.intermediate_size"),
            # one shared expert, with the total width
            r.always(feed_forwards__E__num_shared_experts=1),
            r.key("moe_shared_expert_intermediate_size", "feed_forwards.E.shared_intermediate_size"),
            r.key("moe_latent_size", "feed_forwards.E.latent_size"),
            r.key("routed_scaling_factor", "feed_forwards.E.scaling_factor"),
            r.key("norm_topk_prob", "feed_forwards.E.normalize_weights"),
            r.key("n_group", "feed_forwards.E.num_groups"),
            r.key("topk_group", "feed_forwards.E.top_k_groups"),
            r.always(
                feed_forwards__E__score_function="sigmoid",
                feed_forwards__E__score_correction_bias=True,
            ),
            r.ignored(
                "time_step_limit", "expand", "mamba_proj_bias", "n_shared_experts", "chunk_size",
                "hidden_dropout", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
                "num_logits_to_keep", "output_router_logits", "rescale_prenorm_residual",
                "residual_in_fp32", "use_mamba_kernels",
            ),
        ),
        mixers=r.LayerRule(("layers_block_type",), _layers("MS"), _write_layers),
        ffn=r.LayerRule((), _layers("-E"), lambda layers: {}),
        literal=True,
        weights=(
            r.rule("backbone.embeddings.weight", "model.embed_tokens.weight"),
            r.rule("backbone.norm_f.weight", "model.norm.weight"),
            r.rule("lm_head.weight"),
            *r.renames(THEIRS, OURS, {"norm": "mixer_residual.norm_in"}, mixer="MS"),
            *r.renames(THEIRS, OURS, {"norm": "ffn_residual.norm_in"}, ffn="-E"),
            *r.mamba2_weights(BLOCK),
            *r.renames(BLOCK, r.MIXER, ["q_proj", "k_proj", "v_proj", "o_proj"], mixer="S"),
            *r.renames(BLOCK, r.FFN, ["up_proj", "down_proj"], ffn="-"),
            r.rule(f"{BLOCK}gate.weight", f"{r.FFN}router.weight", ffn="E"),
            r.rule(
                f"{BLOCK}gate.e_score_correction_bias",
                f"{r.FFN}router.score_correction_bias",
                ffn="E",
            ),
            *(
                r.rule(
                    f"{BLOCK}experts.{{e}}.{name}.weight", f"{r.FFN}experts.{name}", r.Stack(), ffn="E"
                )
                for name in ("up_proj", "down_proj")
            ),
            *r.renames(
                f"{BLOCK}shared_experts.", f"{r.FFN}shared_experts.", ["up_proj", "down_proj"],
                ffn="E",
            ),
            *r.renames(
                BLOCK, r.FFN, {"fc1_latent_proj": "latent_in", "fc2_latent_proj": "latent_out"},
                ffn="E",
            ),
        ),
        spellings=(("model.", "backbone."),),
        mtp=r.MTPMap(
            key="num_nextn_predict_layers",
            keys=("mtp_layers_block_type",),
            layout=_mtp_layout,
            write=_write_mtp_layout,
            layers=("backbone.layers.", "mtp.layers."),
            embedding_norm="mtp.layers.{first}.enorm",
            hidden_norm="mtp.layers.{first}.hnorm",
            projection="mtp.layers.{first}.eh_proj",
            norm="mtp.layers.{last}.final_layernorm",
        ),
        notes="Time steps are at least time_step_min, as in transformers' class.",
    )
)  # fmt: skip
