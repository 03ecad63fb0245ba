"""Qwen3.5, dense and MoE, text model: Qwen3-Next with less fused linear projections."""

from hybrid.convert import published
from hybrid.convert import rules as r
from hybrid.convert.families.qwen3_next import (
    DELTA_NET_WEIGHTS,
    DENSE_WIDTH,
    QWEN_EXPERTS,
    QWEN_HYBRID,
    THEIRS,
)

LETTERS = {"D": "gated_delta_net", "S": "softmax_attention"}
LAYERS = r.by_type(linear_attention="D", full_attention="S")
WEIGHTS = (
    *r.ends(),
    *r.PRE_NORMS,
    *r.output_gate_weights(),
    *r.QK_NORMS,
    r.rule(
        f"{THEIRS}in_proj_qkv.weight",
        [f"{r.MIXER}{name}_proj.weight" for name in "qkv"],
        r.Split(),
        mixer="D",
    ),
    *r.renames(
        f"{THEIRS}in_proj_",
        r.MIXER,
        {"z": "gate_proj", "b": "beta_proj", "a": "decay_proj"},
        mixer="D",
    ),
    *DELTA_NET_WEIGHTS,
)
# checkpoints contain a vision model
INSIDE = (("model.language_model.", "model."),)
UNREAD = ("model.visual.*",)
MTP = "mtp_num_hidden_layers"

QWEN3_5 = r.register_family(
    r.Family(
        name="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        limits=published.irregular,
        published=published.interval,
        wrap_as="qwen3_5",
        letters=LETTERS,
        config=(*QWEN_HYBRID, DENSE_WIDTH),
        mixers=LAYERS,
        ffn=r.everywhere("-"),
        weights=(*WEIGHTS, *r.DENSE_WEIGHTS),
        unread_weights=UNREAD,
        spellings=INSIDE,
        legacy_rope=r.no_words,  # no format before transformers 5
        mtp=r.qwen_mtp(MTP, lambda config: "S-"),
        wrapped_in=("qwen3_5",),
    )
)

QWEN3_5_MOE = r.register_family(
    r.Family(
        name="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        limits=published.irregular,
        published=published.interval,
        wrap_as="qwen3_5_moe",
        filed_whole=(".experts.",),
        letters=LETTERS,
        config=(*QWEN_HYBRID, *QWEN_EXPERTS),
        mixers=LAYERS,
        ffn=r.everywhere("E"),
        weights=(*WEIGHTS, *r.QWEN_MOE_WEIGHTS, *r.SHARED_EXPERT_WEIGHTS),
        unread_weights=UNREAD,
        spellings=INSIDE,
        legacy_rope=r.no_words,  # no format before transformers 5
        mtp=r.qwen_mtp(MTP, lambda config: "SE"),
        wrapped_in=("qwen3_5_moe",),
    )
)
