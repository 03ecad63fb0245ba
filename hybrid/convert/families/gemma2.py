"""Gemma 2: alternating sliding and full layers, soft caps on attention logits and output logits."""

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.gemma3_text import GEMMA, GEMMA_WEIGHTS, LETTERS, TYPES

GEMMA2 = r.register_family(
    r.Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        limits=published.windowed("mlx-lm"),
        letters=LETTERS,
        config=(
            *GEMMA,
            r.rope("S", "W"),
            r.key("attn_logit_softcapping", "mixers.S.soft_cap", "mixers.W.soft_cap"),
        ),
        mixers=r.by_type(**TYPES),
        ffn=r.everywhere("-"),
        weights=GEMMA_WEIGHTS,
    )
)
