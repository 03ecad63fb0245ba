"""Qwen3.5, dense and MoE: Qwen3-Next with the linear projections less fused, text part only."""

from hybrid.convert import published
from hybrid.convert.families.common import (
    DENSE_WEIGHTS,
    MIXER,
    PRE_NORMS,
    QK_NORMS,
    QWEN_MOE_WEIGHTS,
    SHARED_EXPERT_WEIGHTS,
    ends,
    output_gate_weights,
    qwen_mtp,
)
from hybrid.convert.families.qwen3_next import (
    DELTA_NET_WEIGHTS,
    DENSE_WIDTH,
    QWEN_EXPERTS,
    QWEN_HYBRID,
    THEIRS,
)
from hybrid.convert.family import Family, by_type, everywhere, register_family
from hybrid.convert.older import no_words
from hybrid.convert.weights import Split, renames, rule

LETTERS = {"D": "gated_delta_net", "S": "softmax_attention"}
LAYERS = by_type(linear_attention="D", full_attention="S")
WEIGHTS = (
    *ends(),
    *PRE_NORMS,
    *output_gate_weights(),
    *QK_NORMS,
    rule(
        f"{THEIRS}in_proj_qkv.weight",
        [f"{MIXER}{name}_proj.weight" for name in "qkv"],
        Split(),
        mixer="D",
    ),
    *renames(
        f"{THEIRS}in_proj_",
        MIXER,
        {"z": "gate_proj", "b": "beta_proj", "a": "decay_proj"},
        mixer="D",
    ),
    *DELTA_NET_WEIGHTS,
)
# their checkpoints hold images too
INSIDE = (("model.language_model.", "model."),)
UNREAD = ("model.visual.*",)
MTP = "mtp_num_hidden_layers"

QWEN3_5 = register_family(
    Family(
        name="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        limits=published.irregular,
        published=published.interval,
        wrap_as="qwen3_5",
        letters=LETTERS,
        config=(*QWEN_HYBRID, DENSE_WIDTH),
        mixers=LAYERS,
        ffn=everywhere("-"),
        weights=(*WEIGHTS, *DENSE_WEIGHTS),
        unread_weights=UNREAD,
        spellings=INSIDE,
        older=no_words,  # as old as transformers 5
        mtp=qwen_mtp(MTP, lambda config: "S-"),
        wrapped_in=("qwen3_5",),
    )
)

QWEN3_5_MOE = register_family(
    Family(
        name="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        limits=published.irregular,
        published=published.interval,
        wrap_as="qwen3_5_moe",
        filed_whole=(".experts.",),
        letters=LETTERS,
        config=(*QWEN_HYBRID, *QWEN_EXPERTS),
        mixers=LAYERS,
        ffn=everywhere("E"),
        weights=(*WEIGHTS, *QWEN_MOE_WEIGHTS, *SHARED_EXPERT_WEIGHTS),
        unread_weights=UNREAD,
        spellings=INSIDE,
        older=no_words,  # as old as transformers 5
        mtp=qwen_mtp(MTP, lambda config: "SE"),
        wrapped_in=("qwen3_5_moe",),
    )
)
