"""Bamba: Mamba-2 with softmax layers at listed indices, rotary on half of each head."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert import rules as r


def _read(config: Any) -> Sequence[str]:
    softmax = config.attn_layer_indices or ()
    return ["S" if i in softmax else "M" for i in range(config.num_hidden_layers)]


def _legacy_rope(values: r.Flat) -> r.Flat:
    """Write ``attn_rotary_emb``, without which vLLM rotates whole heads."""
    words = r.rope_words(values)
    share = words.get("partial_rotary_factor", 1)
    width = values["hidden_size"] // values["num_attention_heads"]
    return {**words, "attn_rotary_emb": int(share * width)} if words else {}


def _write(layers: Sequence[str]) -> dict[str, Any]:
    return {"attn_layer_indices": [i for i, letter in enumerate(layers) if letter == "S"]}


BAMBA = r.register_family(
    r.Family(
        name="bamba",
        architecture="BambaForCausalLM",
        limits=published.clamped,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention(partial=True),
            r.attention_bias(),
            *r.dense("mlp_bias"),
            *r.mamba2_options(
                "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv",
                "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
            ),
            r.ignored("mamba_chunk_size", "z_loss_coefficient", "num_logits_to_keep"),
        ),
        mixers=r.LayerRule(("attn_layer_indices",), _read, _write),
        ffn=r.everywhere("-"),
        legacy_rope=_legacy_rope,
        weights=(
            *r.ends("final_layernorm"),
            *r.renames(r.LAYER, r.LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *r.renames(r.LAYER, r.LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *r.ATTENTION_WEIGHTS,
            *r.mamba2_weights(f"{r.LAYER}mamba."),
            *r.renames(f"{r.LAYER}feed_forward.", r.FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
        ),
    )
)  # fmt: skip
