"""SmolLM3: Llama with some layers without positions; these are N, the others S."""

from collections.abc import Sequence
from typing import Any

from hybrid.convert import rules as r


def _read(config: Any) -> Sequence[str]:
    return ["S" if has else "N" for has in config.no_rope_layers[: config.num_hidden_layers]]


def _write(layers: Sequence[str]) -> dict[str, Any]:
    return {"no_rope_layers": [int(letter == "S") for letter in layers]}


SMOLLM3 = r.register_family(
    r.Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        letters={"S": "softmax_attention", "N": "softmax_attention"},
        choose=lambda mixer, options: "N" if options.rope_parameters is None else "S",
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention("SN"),
            r.always(mixers__N__rope_parameters=None),
            r.attention_bias("SN"),
            *r.dense("mlp_bias"),
            r.must("use_sliding_window", False),
            r.ignored("sliding_window", "layer_types", "no_rope_layer_interval"),
        ),
        mixers=r.LayerRule(("no_rope_layers",), _read, _write),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *r.PRE_NORMS, *r.ATTENTION_WEIGHTS, *r.DENSE_WEIGHTS),
    )
)
