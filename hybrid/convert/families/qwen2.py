"""Qwen2 and Qwen2.5: biases on q, k, v; the last layers may have a window."""

from collections.abc import Sequence

from hybrid.convert.families.common import (
    ATTENTION_WEIGHTS,
    DENSE_WEIGHTS,
    PRE_NORMS,
    SIZES,
    attention,
    dense,
    ends,
)
from hybrid.convert.families.gemma3_text import LETTERS, TYPES
from hybrid.convert.family import (
    Family,
    Flat,
    LayerRule,
    always,
    by_type,
    everywhere,
    key,
    register_family,
)

BY_TYPE = by_type(**TYPES)


def _write(layers: Sequence[str]) -> Flat:
    """The list, and where windows begin for software that does not read it."""
    first = next((i for i, letter in enumerate(layers) if letter == "W"), len(layers))
    windows = {"use_sliding_window": "W" in layers, "max_window_layers": first}
    return {**BY_TYPE.write(layers), **windows}


QWEN2 = register_family(
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        letters=LETTERS,
        config=(
            *SIZES,
            key("rms_norm_eps", "norm_eps"),
            *attention("SW"),
            always(mixers__S__bias=True, mixers__W__bias=True),
            key("sliding_window", "mixers.W.window"),
            *dense(),
        ),
        mixers=LayerRule(
            ("layer_types", "use_sliding_window", "max_window_layers"), BY_TYPE.read, _write
        ),
        ffn=everywhere("-"),
        weights=(*ends(), *PRE_NORMS, *ATTENTION_WEIGHTS, *DENSE_WEIGHTS),
    )
)
