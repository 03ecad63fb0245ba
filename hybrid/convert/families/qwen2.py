"""Qwen2 and Qwen2.5: biases on q, k, v; the last layers may have a window."""

from collections.abc import Sequence

from hybrid.convert import rules as r
from hybrid.convert.families.gemma3_text import LETTERS, TYPES

BY_TYPE = r.by_type(**TYPES)


def _write(layers: Sequence[str]) -> r.Flat:
    """Write the list of layer types, and the first windowed layer for software without the list."""
    first = next((i for i, letter in enumerate(layers) if letter == "W"), len(layers))
    windows = {"use_sliding_window": "W" in layers, "max_window_layers": first}
    return {**BY_TYPE.write(layers), **windows}


QWEN2 = r.register_family(
    r.Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        letters=LETTERS,
        config=(
            *r.SIZES,
            r.key("rms_norm_eps", "norm_eps"),
            *r.attention("SW"),
            r.always(mixers__S__bias=True, mixers__W__bias=True),
            r.key("sliding_window", "mixers.W.window"),
            *r.dense(),
        ),
        mixers=r.LayerRule(
            ("layer_types", "use_sliding_window", "max_window_layers"), BY_TYPE.read, _write
        ),
        ffn=r.everywhere("-"),
        weights=(*r.ends(), *r.PRE_NORMS, *r.ATTENTION_WEIGHTS, *r.DENSE_WEIGHTS),
    )
)
