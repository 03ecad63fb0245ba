"""SmolLM3: Llama without positions in some layers, which are N here and S the others."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    PRE_NORMS,
    SIZES,
    attention,
    attention_bias,
    dense,
    ends,
)
from hybrid.convert.family import (
    Family,
    LayerRule,
    always,
    everywhere,
    ignored,
    key,
    must,
    register_family,
)


def _read(config: Any) -> Sequence[str]:
    return ["S" if has else "N" for has in config.no_rope_layers[: config.num_hidden_layers]]


def _write(layers: Sequence[str]) -> dict[str, Any]:
    return {"no_rope_layers": [int(letter == "S") for letter in layers]}


SMOLLM3 = register_family(
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        letters={"S": "softmax_attention", "N": "softmax_attention"},
        choose=lambda mixer, options: "N" if options.rope_parameters is None else "S",
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention("SN"),
            always(mixers__N__rope_parameters=None),
            attention_bias("SN"),
            *dense("mlp_bias"),
            must("use_sliding_window", False),
            ignored("sliding_window", "layer_types", "no_rope_layer_interval"),
        ),
        mixers=LayerRule(("no_rope_layers",), _read, _write),
        ffn=everywhere("-"),
        weights=(*ends(), *PRE_NORMS, *ATTENTION_WEIGHTS, *DENSE_WEIGHTS),
    )
)
