"""config.json as published, in the words of its day, against the same model in configs/models.

What transformers writes today says the same in other words; that is what other tests read.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hybrid import HybridForCausalLM
from hybrid.convert import export
from hybrid.convert.checkpoint import read_json
from hybrid.convert.compare import differences
from hybrid.convert.configs import read_published, to_ours
from hybrid.convert.stack import on_meta
from hybrid.plan import load_model_config

CONFIGS = sorted((Path(__file__).parent / "published_configs").glob("*.json"))
OURS = Path(__file__).parents[2] / "configs" / "models" / "published"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_published_config_says_what_our_file_says(path):
    family, theirs = read_published(read_json(path), path)
    published = to_ours(family, theirs)
    ours = load_model_config(str(OURS / f"{path.stem}.yaml"))
    assert differences(family, on_meta(published), on_meta(ours)) == []
    assert published.max_position_embeddings == ours.max_position_embeddings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "here/config.json: no model_type, so the family is unknown"),
        ({"model_type": "qwen3_5"}, "here/config.json: qwen3_5 without its text_config"),
        ({"model_type": "minimax_text_01"}, "attn_type_list: expected 0 .* or 1 .*, found None"),
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
def test_minimax_in_its_own_words_rotates_half_of_each_head(tmp_path, monkeypatch):
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
    assert torch.equal(again(ids).logits, ours(ids).logits)


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
