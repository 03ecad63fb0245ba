"""Gemma 2: sliding and full layers by turns, caps on the logits of attention and of the head."""

from hybrid.convert import published
from hybrid.convert.families.gemma3_text import GEMMA, GEMMA_WEIGHTS, LETTERS, TYPES
from hybrid.convert.family import Family, by_type, everywhere, key, register_family, rope

GEMMA2 = register_family(
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        limits=published.windowed("mlx-lm"),
        letters=LETTERS,
        config=(
            *GEMMA,
            rope("S", "W"),
            key("attn_logit_softcapping", "mixers.S.soft_cap", "mixers.W.soft_cap"),
        ),
        mixers=by_type(**TYPES),
        ffn=everywhere("-"),
        weights=GEMMA_WEIGHTS,
    )
)
