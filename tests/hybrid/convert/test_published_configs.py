"""config.json as published, in the words of its day, against the same model in configs/models.

What transformers writes today says the same in other words; that is what other tests read.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hybrid import HybridForCausalLM
from hybrid.convert import export, get_family
from hybrid.convert.checkpoint import read_json
from hybrid.convert.compare import differences
from hybrid.convert.configs import read_published, to_ours
from hybrid.convert.stack import on_meta
from hybrid.plan import load_model_config

CONFIGS = sorted((Path(__file__).parent / "published_configs").glob("*.json"))
OURS = Path(__file__).parents[3] / "configs" / "models" / "published"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_says_what_our_file_says(path):
    family, theirs = read_published(read_json(path), path)
    published = to_ours(family, theirs)
    ours = load_model_config(str(OURS / f"{path.stem}.yaml"))
    assert differences(family, on_meta(published), on_meta(ours)) == []
    assert published.max_position_embeddings == ours.max_position_embeddings


WORDS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
# without positions, though the file has a base; or with no dictionary in any version
OTHER = ("kimi-linear-48b-a3b", "ring-mini-linear-2.0")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_exports_have_positions_in_the_words_of_the_published_file(path):
    """Beside those of transformers 5, for servers."""
    values = read_json(path)
    family, theirs = read_published(values, path)
    found = family.legacy_rope(json.loads(theirs.to_json_string(use_diff=False)))
    published = {name: values[name] for name in WORDS if name in values}
    if scaling := published.get("rope_scaling"):
        published["rope_scaling"] = {"rope_type": scaling.get("type"), **scaling}
    if path.stem in OTHER:
        assert found == {}
    else:
        assert {name: found[name] for name in published} == published
        assert all(found[name] is None for name in found.keys() - published.keys())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "here/config.json: no model_type, so the family is unknown"),
        ({"model_type": "qwen3_5"}, "here/config.json: qwen3_5 without its text_config"),
        ({"model_type": "minimax_text_01"}, "attn_type_list: expected 0 .* or 1 .*, got None"),
        ({"model_type": "minimax_m1", "attn_type_list": [0, 2]}, r"attn_type_list: .* \[0, 2\]"),
    ],
)
def test_a_config_that_says_too_little(values, message):
    with pytest.raises(ValueError, match=message):
        read_published(values, "here/config.json")


# Logits of checkpoints whose config is in other words than their class has

SIZES: Any = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@torch.no_grad()
def test_minimax_in_its_own_words_rotates_half_of_each_head(
    tmp_path, monkeypatch, assert_same_weights, assert_close_to_rounding
):
    """The config of MiniMax's own code. transformers' class is given its rotation here."""
    torch.manual_seed(0)
    modeling = importlib.import_module("transformers.models.minimax.modeling_minimax")
    sizes = SIZES | {"head_dim": 16, "num_local_experts": 3, "block_size": 256}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    sizes |= {
        "full_attn_alpha_factor": 1.5,
        "linear_attn_beta_factor": 0.75,
        "mlp_alpha_factor": 2.0,
    }
    config = transformers.MiniMaxConfig(**sizes, layer_types=layers)
    theirs = transformers.MiniMaxForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for name in [name for name in values if name.endswith("_factor")] + ["layer_types"]:
        del values[name]
    values |= {
        "model_type": "minimax_text_01", "attn_type_list": [0, 1, 0], "rotary_dim": 8,
        "layernorm_full_attention_alpha": 1.5, "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 1.0, "layernorm_linear_attention_beta": 0.75,
        "layernorm_mlp_alpha": 2.0, "layernorm_mlp_beta": 1.0, "postnorm": True,
    }  # fmt: skip
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values))

    def rotate(q, k, cos, sin):
        parts = ((part[..., :8], part[..., 8:]) for part in (q, k))
        return [torch.cat([plain(a, a, cos, sin)[0], b], dim=-1) for a, b in parts]

    plain = modeling.apply_rotary_pos_emb
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", rotate)
    base = theirs.config.rope_parameters["rope_theta"]
    theirs.model.rotary_emb.inv_freq = base ** -(torch.arange(0, 8, 2) / 8)
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    ours = HybridForCausalLM.from_published(tmp_path / "theirs")
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5
    export(ours, tmp_path / "out", "minimax")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rotary_dim"] == 8
    again = HybridForCausalLM.from_published(tmp_path / "out")
    assert_same_weights(again, ours)
    assert_close_to_rounding(again(ids).logits, ours(ids).logits)


@torch.no_grad()
def test_falcon_mamba_is_as_wide_as_it_says(tmp_path):
    """The published config has 16 for `expand`, and its tensors the width of `intermediate_size`."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "time_step_rank": 3}
    config = transformers.FalconMambaConfig(**sizes, expand=2)
    with pytest.MonkeyPatch.context() as patch:
        for package in ("mamba_ssm", "causal_conv1d"):  # they would want a GPU
            patch.setitem(sys.modules, package, None)
        theirs = transformers.FalconMambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["intermediate_size"] == 48
    (tmp_path / "config.json").write_text(json.dumps(values | {"expand": 16}))
    ours = HybridForCausalLM.from_published(tmp_path)
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


@torch.no_grad()
def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 10, "q_lora_rank": 14,
             "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_routed_experts": 4,
             "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0,
             "first_k_dense_replace": 1, "moe_intermediate_size": 12}  # fmt: skip
    config = transformers.DeepseekV3Config(**SIZES | sizes)
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "kimi_k2"}))
    ours = HybridForCausalLM.from_published(tmp_path)
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


# Files that their own save does not write


@torch.no_grad()
def test_olmo_hybrid_with_convolutions_of_unequal_widths(
    tmp_path, rewrite, assert_same_weights, assert_close_to_rounding
):
    torch.manual_seed(0)
    sizes = SIZES | {"linear_key_head_dim": 6, "linear_value_head_dim": 12, "pad_token_id": 0}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    config = transformers.OlmoHybridConfig(**sizes, layer_types=layers)
    theirs = transformers.OlmoHybridForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")

    def publish(tensors):
        """Keys and values as wide as they are, and the norms by their names in memory."""
        for name in [name for name in tensors if "q_conv1d" in name]:
            parts = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
            whole = torch.cat([tensors[part] for part in parts])
            cut = whole.split([24, 24, 48])
            tensors.update({p: c.contiguous() for p, c in zip(parts, cut, strict=True)})
        for name in [name for name in tensors if "attention_layer_norm" in name]:
            tensors[name.replace("attention_layer_norm", "input_layernorm")] = tensors.pop(name)

    shutil.copytree(tmp_path / "theirs", tmp_path / "published")
    rewrite(tmp_path / "published", publish)
    ids = torch.randint(3, 61, (2, 9))
    for folder in ("theirs", "published"):
        ours = HybridForCausalLM.from_published(tmp_path / folder)
        expected = theirs(ids).logits
        assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5
        export(ours, tmp_path / f"{folder}-back", "olmo_hybrid")
        kind: Any = transformers.OlmoHybridForCausalLM
        again, info = kind.from_pretrained(tmp_path / f"{folder}-back", output_loading_info=True)
        assert not any(info.values())
        assert_same_weights(again, theirs)
        assert_close_to_rounding(again.eval()(ids).logits, expected)


@torch.no_grad()
def test_qwen3_5_inside_a_model_for_images(tmp_path, rewrite):
    torch.manual_seed(0)
    sizes = SIZES | {"linear_key_head_dim": 6, "linear_value_head_dim": 8, "head_dim": 16,
                     "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                     "layer_types": ["linear_attention", "full_attention"] * 2,
                     "num_hidden_layers": 4}  # fmt: skip
    inner = transformers.Qwen3_5TextConfig(**sizes)
    theirs = transformers.Qwen3_5ForCausalLM(inner).eval()
    theirs.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def wrap(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors["model.visual.patch_embed.weight"] = torch.zeros(2)
        tensors["mtp.fc.weight"] = torch.zeros(2)

    rewrite(tmp_path, wrap)
    ours = HybridForCausalLM.from_published(tmp_path)
    ids = torch.randint(3, 61, (2, 9))
    expected = theirs(ids).logits
    assert ((ours(ids).logits - expected).abs().max() / expected.std()) < 1e-5


# Exports in the words of transformers 4 and of 5

YARN = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 8}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
BASE = {**PLAIN, "rope_theta": 500000.0}
HALF = {**PLAIN, "partial_rotary_factor": 0.5}
LATENT = {"num_key_value_heads": 4, "head_dim": 5, "kv_lora_rank": 10, "q_lora_rank": None,
          "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "first_k_dense_replace": 3,
          "pad_token_id": 0}  # fmt: skip
TYPES = [{"layer_types": [kind, "full_attention", kind]}
         for kind in ("linear_attention", "sliding_attention")]  # fmt: skip


def by_type(sliding, full):
    return {"sliding_attention": sliding, "full_attention": full}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "sizes", "rope", "words"),
    [
        ("llama", {}, PLAIN | YARN, {"rope_theta": 500.0, "rope_scaling": YARN}),
        ("qwen3_next", {"head_dim": 12, "decoder_sparse_step": 9, **TYPES[0]}, HALF,
         {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("bamba", {"mamba_n_heads": 6, "mamba_d_head": 8, "attn_layer_indices": [1], "head_dim": 8,
                   "num_attention_heads": 3, "num_key_value_heads": 1}, HALF,
         {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
          "attn_rotary_emb": 4}),
        ("gemma3_text", {"sliding_window": 4, **TYPES[1]},
         by_type({**PLAIN, "rope_theta": 70.0}, PLAIN | YARN),
         {"rope_theta": 500.0, "rope_scaling": YARN, "rope_local_base_freq": 70.0}),
        # with another base transformers 5 would read the older words alone for full layers only
        ("olmo3", {"sliding_window": 4, **TYPES[1]}, by_type(BASE, BASE | YARN),
         {"rope_theta": 500000.0, "rope_scaling": YARN}),
        # their class has a base of its own beside the dictionary, which it then does not use
        ("bailing_hybrid", {**LATENT, **TYPES[0]}, PLAIN, {"rope_theta": 500.0, "rope_scaling": None}),
        # what the older words cannot say is not said by halves
        ("gemma3_text", {"sliding_window": 4, **TYPES[1]}, by_type(PLAIN | YARN, PLAIN), {}),
        ("olmo3", {"sliding_window": 4, **TYPES[1]}, by_type({**PLAIN, "rope_theta": 70.0}, PLAIN), {}),
    ],
)  # fmt: skip
def test_positions_in_older_words_and_in_newer(
    family, sizes, rope, words, tmp_path, assert_same_weights, assert_close_to_rounding
):
    """transformers reads the same logits from each alone; servers may know one of them only."""
    found = get_family(family)
    kind = getattr(transformers, found.architecture, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {found.architecture}")
    torch.manual_seed(0)
    theirs = kind(found.their_config({**SIZES, **sizes, "rope_parameters": rope})).eval()
    for tensor in theirs.parameters():  # attention that is sharp, so that positions are felt
        tensor.mul_(10 if tensor.ndim > 1 else 1)
    ids = torch.randint(3, 61, (2, 19))
    expected = theirs(ids).logits
    export(HybridForCausalLM.from_published(theirs), tmp_path, family)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {name: values[name] for name in (*WORDS, "attn_rotary_emb") if name in values} == words
    for left_out in ([], ["rope_parameters"], words) if words else ([],):
        fewer = {name: value for name, value in values.items() if name not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(fewer))
        again = kind.from_pretrained(tmp_path).eval()
        assert_same_weights(again, theirs)
        assert_close_to_rounding(again(ids).logits, expected)
