"""Hybrids of one's own as published ones, and what their maps refuse; beside `families`."""

import json
import re

import pytest
import torch
import transformers

import hybrid
from hybrid.convert import export, get_family
from hybrid.convert.configs import to_ours

ROPE = {"rope_type": "default", "rope_theta": 500.0}
MAMBA = {"num_heads": 6, "head_dim": 8, "state_size": 5}
LATENT = {"num_heads": 4, "latent_dim": 10, "head_dim": 6, "rope_dim": 4, "value_head_dim": 7,
          "output_gate": True, "latent_norm_eps": 1e-6}  # fmt: skip
GEMMA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "scale": 0.25, "qk_norm": "head",
         "qk_norm_type": "zero_centered_rmsnorm"}  # fmt: skip
EXPERTS = {"num_experts": 6, "top_k": 2, "intermediate_size": 12, "num_shared_experts": 1,
           "score_function": "sigmoid", "score_correction_bias": True}  # fmt: skip
SHARED = {"blocks": 2, "lora_rank": 3, "concat_embeddings": True, "depth_projection": True,
          "output": "next"}  # fmt: skip
RELU2 = {"-": {"activation": "relu2", "intermediate_size": 28}}

OWN = {
    "gemma3_text": ("LLG", {
        "norm": "zero_centered_rmsnorm", "norm_position": "sandwich", "tie_word_embeddings": True,
        "embedding_multiplier": "sqrt_hidden_size",
        "mixers": {"L": {"type": "sliding_window_attention", "window": 5, **GEMMA},
                   "G": {"type": "softmax_attention", **GEMMA, "rope_parameters": ROPE}}}),
    "falcon_h1": ("[MS]2", {
        "parallel_combine": "sum", "mixers": {"M": MAMBA, "S": {"num_heads": 3, "scale": 0.3}},
        "residuals": {"S": {"input_multiplier": 0.7}, "-": {"output_multiplier": 0.6}}}),
    # a feed-forward within each layer becomes one of its own
    "nemotron_h": ("MS", {
        "feed_forwards": RELU2, "norm_eps": 1e-5,
        "mixers": {"M": MAMBA, "S": {"num_heads": 3, "rope_parameters": None}}}),
    "recurrent_gemma": ("UW", {
        "norm": "zero_centered_rmsnorm", "embedding_multiplier": 4.90625, "logit_softcap": 5.0,
        "feed_forwards": {"-": {"activation": "geglu_tanh", "bias": True}},
        "mixers": {"U": {"num_heads": 3}, "W": {"num_heads": 3, "window": 5, "output_bias": True}}}),
    "zamba2": ("QMQMMQM", {
        "ffn": {"Q": "-", "default": ""}, "shared": {"Q": SHARED}, "norm_eps": 1e-5,
        "residuals": {"Q": {"skip_multiplier": 0.0}}, "tie_word_embeddings": True,
        "feed_forwards": {"-": {"activation": "geglu"}},
        "mixers": {"M": {**MAMBA, "num_heads": 6},
                   "Q": {"type": "softmax_attention", "num_heads": 3, "rope_parameters": None,
                         "scale": 8**-0.5}}}),
    "bailing_hybrid": ("KA", {
        "feed_forwards": {"E": EXPERTS}, "ffn": "-E",
        "mixers": {"K": {"num_heads": 4, "head_dim": 5, "value_head_dim": 5, "gate_rank": 0},
                   "A": LATENT}}),
    "xlstm": ("XX", {"logit_softcap": 9.0, "mixers": {"X": {"num_heads": 4, "head_dim": 16,
                                                           "value_head_dim": 32}}}),
}  # fmt: skip


def build(layout, **options):
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 61,
        "hidden_size": 24,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    config = hybrid.HybridConfig(layout=layout, **{**defaults, **options})
    return hybrid.HybridForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", list(OWN))
def test_a_hybrid_of_ours_becomes_a_published_one(family, tmp_path):
    layout, options = OWN[family]
    ours = build(layout, **options)
    assert export(ours, tmp_path / "out", family) == family
    kind = getattr(transformers, get_family(family).architecture)
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs.eval()(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3_text",
         {"mixers": {letter: {"type": kind, **GEMMA, "rope_parameters": None} for letter, kind in
                     (("L", "sliding_window_attention"), ("G", "softmax_attention"))}},
         r"mixers.S.rope_parameters: None here, where theirs has positions in every layer"),
        ("falcon_h1", {"parallel_combine": "mean"},
         r"parallel_combine: 'mean' here, falcon_h1 can only say 'sum'"),
        ("nemotron_h", {"mixers": {"M": MAMBA, "S": {"num_heads": 3}}},
         r"mixers.S.rope_parameters: .* here \(layer 1\), nemotron_h can only say None"),
        ("nemotron_h", {"mixers": {"M": {**MAMBA, "dt_limit": [0.1, 0.5]}, "S": {"num_heads": 3,
                                   "rope_parameters": None}}},
         r"mixers.M.dt_limit: \[0.1, 0.5\] here \(layer 0\), nemotron_h can only say \[0.1, inf\]"),
        ("recurrent_gemma", {"embedding_multiplier": "sqrt_hidden_size"},
         r"embedding_multiplier: 'sqrt_hidden_size' here, recurrent_gemma can only say 4.90625"),
        ("zamba2", {"layout": "MQL", "shared": {"Q": {**SHARED, "blocks": 1}}},
         r"layer 2 \(L\): lightning_attention has no place in zamba2"),
        ("zamba2", {"shared": {"Q": {**SHARED, "lora_targets": ["down_proj"]}}},
         r"shared.Q.lora_targets: \['down_proj'\] here .* can only say \['gate_proj', 'up_proj'\]"),
        ("bailing_hybrid", {"mixers": {"K": {"num_heads": 4, "head_dim": 5, "value_head_dim": 5},
                                       "A": LATENT}},
         r"mixers.K.gate_rank: 5 here \(layer 0\), bailing_hybrid can only say 0"),
        ("xlstm", {"mixers": {"X": {"num_heads": 4, "head_dim": 16, "value_head_dim": 32,
                                    "input_gate": "sigmoid"}}},
         r"mixers.X.input_gate: 'sigmoid' here \(layers 0-1\), xlstm can only say 'exp'"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named(family, change, message, tmp_path):
    layout, options = OWN[family]
    changed = {**options, **change}
    model = build(changed.pop("layout", layout), **changed)
    with pytest.raises(ValueError, match=f"this model cannot be written as {family}") as caught:
        export(model, tmp_path / "out", family)
    assert any(re.search(message, line) for line in caught.value.obstacles)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 cannot"),
        ("falcon_h1", {"mamba_proj_bias": True}, "mamba_proj_bias: True cannot be expressed here"),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias: True cannot be expressed here with experts"),
        ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings: False cannot be"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode: 'fused' cannot be expressed here"),
    ],
)
def test_what_cannot_be_read_is_named(family, values, message):
    found = get_family(family)
    with pytest.raises(ValueError, match=message):
        to_ours(found, found.their_config(values))


def test_a_shared_block_feeds_a_mamba_layer(tmp_path):
    """Which all of Zamba2's do."""
    _, options = OWN["zamba2"]
    with pytest.raises(ValueError, match="has a Mamba-2 layer behind each shared block"):
        export(build("MQQM", **options), tmp_path / "out", "zamba2")


@torch.no_grad()
@pytest.mark.parametrize("given", ["folder", "model"])
def test_gemma_3_inside_a_model_for_images(tmp_path, given):
    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 4, "head_dim": 10,
            "num_key_value_heads": 2, "sliding_window": 5, "num_hidden_layers": 2, "vocab_size": 61,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=58, eoi_token_index=59,
    )  # fmt: skip
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    ours = hybrid.HybridForCausalLM.from_published(tmp_path if given == "folder" else theirs)
    ids = torch.randint(3, 50, (2, 9))
    expected = theirs(input_ids=ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5
