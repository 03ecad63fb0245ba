"""Bamba: Mamba-2 with softmax layers at given places, rotary on half of each head."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert import published
from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    FFN,
    LAYER,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
    mamba2_options,
    mamba2_weights,
)
from hybrid.convert.family import (
    Family,
    Flat,
    LayerRule,
    everywhere,
    ignored,
    key,
    register_family,
)
from hybrid.convert.older import rope_words
from hybrid.convert.weights import renames


def _read(config: Any) -> Sequence[str]:
    softmax = config.attn_layer_indices or ()
    return ["S" if i in softmax else "M" for i in range(config.num_hidden_layers)]


def _older(values: Flat) -> Flat:
    """vLLM rotates heads whole where `attn_rotary_emb` does not say how much of them."""
    words = rope_words(values)
    share = words.get("partial_rotary_factor", 1)
    width = values["hidden_size"] // values["num_attention_heads"]
    return {**words, "attn_rotary_emb": int(share * width)} if words else {}


def _write(layers: Sequence[str]) -> dict[str, Any]:
    return {"attn_layer_indices": [i for i, letter in enumerate(layers) if letter == "S"]}


BAMBA = register_family(
    Family(
        name="bamba",
        architecture="BambaForCausalLM",
        limits=published.clamped,
        letters={"M": "mamba2", "S": "softmax_attention"},
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention(partial=True),
            attention_bias(),
            *dense("mlp_bias"),
            *mamba2_options(
                "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv",
                "mamba_conv_bias", "mamba_proj_bias", "mamba_expand",
            ),
            ignored("mamba_chunk_size", "z_loss_coefficient", "num_logits_to_keep"),
        ),
        mixers=LayerRule(("attn_layer_indices",), _read, _write),
        ffn=everywhere("-"),
        older=_older,
        weights=(
            *ends("final_layernorm"),
            *renames(LAYER, LAYER, {"input_layernorm": "mixer_residual.norm_in"}),
            *renames(LAYER, LAYER, {"pre_ff_layernorm": "ffn_residual.norm_in"}),
            *ATTENTION_WEIGHTS,
            *mamba2_weights(f"{LAYER}mamba."),
            *renames(f"{LAYER}feed_forward.", FFN, ["gate_proj", "up_proj", "down_proj"], ffn="-"),
        ),
    )
)  # fmt: skip
