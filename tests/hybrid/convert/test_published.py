"""Exports in the words of published files, which servers read; what servers ignore is warned of."""

import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hybrid
from hybrid.convert import FAMILIES, export, published
from hybrid.convert.checkpoint import Checkpoint, read_json
from hybrid.convert.compare import differences
from hybrid.convert.configs import read_published, to_ours, to_theirs
from hybrid.convert.engine import published_config
from hybrid.convert.stack import on_meta
from hybrid.tokenizer import byte_tokenizer

CONFIGS = sorted((Path(__file__).parent / "published_configs").glob("*.json"))
# what loading code writes, how weights are stored, and what only training reads
BOOKKEEPING = {
    "auto_map", "transformers_version", "use_cache", "torch_dtype", "dtype", "quantization_config",
    "cache_implementation", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size",
    "embedding_dropout", "output_dropout", "block_mlp_init_scale", "block_out_init_scale",
    "block_use_xavier_init", "conv_use_xavier_init", "mtp_use_dedicated_embeddings",
}  # fmt: skip
# keys that an export has otherwise, or not, and why
OTHERWISE = {
    # of the norm that this size does not have
    "falcon-h1-0.5b": {"mamba_norm_before_gate", "mamba_chunk_size"},
    # 16 in the file; its own class goes by intermediate_size
    "falcon-mamba-7b": {"expand"},
    # within rope_parameters
    "gpt-oss-20b": {"initial_context_length"},
    # written as deepseek_v3, which it is; its rope_type beside its type
    "kimi-k2": {"model_type", "rope_scaling"},
    # computed by no class from the one in the file, which is hidden_size / heads
    "kimi-linear-48b-a3b": {"head_dim", "rope_scaling"},
    # the width that the adjustment makes is written, and the adjustment off
    "lfm2-1.2b": {"block_auto_adjust_ff_dim", "block_ff_dim"},
    "minimax-text-01": {"model_type"},
    # of dense feed-forwards, which it does not have; windows, which its class does not have
    "qwen3-next-80b-a3b": {"intermediate_size", "use_sliding_window"},
    # no layer of it is dense; without the weights of its module; images are left out
    "qwen3.5-0.8b": {"mlp_only_layers", "mtp_num_hidden_layers", "rope_parameters"},
    "ring-mini-linear-2.0": {"num_nextn_predict_layers", "rope_scaling", "router_dtype"},
    # words of its own package, which no server reads
    "xlstm-7b": {
        "add_embedding_dropout", "add_forward_backend_padding", "add_post_blocks_norm",
        "add_post_norm", "add_qk_norm", "cell_norm_eps", "chunkwise_kernel",
        "force_bos_token_insert", "gate_linear", "head_dim", "igate_bias_init_range",
        "lm_head_bias", "logits_soft_cap", "mlstm_round_up_to_multiple_of", "sequence_kernel",
        "step_kernel",
    },
}  # fmt: skip


def exported_config(family, values):
    """The config.json of an export of a published config, without its weights."""
    model = on_meta(to_ours(family, read_published(values, "here")[1]))
    config, _ = to_theirs(family, model)
    config.dtype, config.architectures = torch.bfloat16, [family.architecture]
    return published_config(family, config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_export_has_the_keys_of_the_published_file(path):
    values = read_json(path)
    family, _ = read_published(values, path)
    found = exported_config(family, values)
    if family.wrap_as:
        assert found["model_type"] == values["model_type"]
        found, values = found["text_config"], values["text_config"]
    left_out = BOOKKEEPING | OTHERWISE.get(path.stem, set())
    expected = {key: value for key, value in values.items() if key not in left_out}
    assert {key: found.get(key, "missing") for key in expected} == expected


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 28, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_expand": 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
TWO = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "num_hidden_layers": 3, **EXPERTS,
}  # fmt: skip

# family, case -> keyword arguments of their class, and the keys that servers want
WORDS = {
    "qwen3_next": (
        {**SIZES, **DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8,
         "num_hidden_layers": 4, "layer_types": TWO * 2},
        {"full_attention_interval": 2},
    ),
    "qwen3_moe": (
        {**SIZES, **EXPERTS, "num_experts": 4, "num_hidden_layers": 2},
        {"num_experts": 4, "num_local_experts": 4},
    ),
    "nemotron_h": (
        {**SIZES, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
         "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "head_dim": 8,
         "ssm_state_size": 4},
        {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "rms_norm_eps": 1e-5},
    ),
    "granitemoehybrid-dense": (
        {**SIZES, **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 20,
         "num_hidden_layers": 2, "layer_types": TWO},
        {"position_embedding_type": "nope", "layer_types": ["mamba", "attention"],
         "num_experts_per_tok": 0, "intermediate_size": 20},
    ),
    "granitemoehybrid-rope": (
        {**SIZES, **MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2,
         "position_embedding_type": "rope", "num_hidden_layers": 2, "layer_types": TWO},
        {"position_embedding_type": "rope", "rope_theta": 10000.0, "num_experts_per_tok": 2},
    ),
    "jamba-dense": (
        {**SIZES, "num_hidden_layers": 2, "num_experts": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 2,
         "use_mamba_kernels": False},
        {"num_experts": 1, "num_local_experts": 1},
    ),
    "jamba": (
        {**SIZES, "num_hidden_layers": 2, "num_experts": 4, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "use_mamba_kernels": False},
        {"num_experts": 4},
    ),
    "lfm2": (
        {**SIZES, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
         "block_auto_adjust_ff_dim": False},
        {"block_dim": 32, "conv_dim": 32, "block_ff_dim": 28, "full_attn_idxs": [1]},
    ),
    "lfm2_moe": (
        {**SIZES, **EXPERTS, "num_experts": 4, "num_dense_layers": 1, "num_hidden_layers": 2,
         "layer_types": ["conv", "full_attention"]},
        {"block_dim": 32, "conv_dim": 32},
    ),
    "kimi_linear": (
        {**SIZES, **LATENT, "num_key_value_heads": 4, "num_local_experts": 4, "linear_head_dim": 8,
         "linear_num_heads": 2,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "mlp_layer_types": ["dense", "dense", "sparse"]},
        {"linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8,
                                "num_heads": 2, "short_conv_kernel_size": 4},
         "mla_use_nope": True, "rope_theta": 10000.0, "first_k_dense_replace": 2,
         "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1, "use_grouped_topk": True,
         "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1,
         "moe_renormalize": True, "num_expert_group": 1, "model_max_length": 64},
    ),
    "bailing_hybrid": (
        {**SIZES, **LATENT, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4,
         "n_group": 2, "topk_group": 1,
         "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        {"architectures": ["BailingMoeV3ForCausalLM"], "num_experts_per_tok": 2, "n_group": 2,
         "max_position_embeddings": 64, "no_kda_lora": True, "head_dim": 8,
         "gated_attention_proj_granularity_type": "head_wise"},
    ),
    "mamba2": (
        {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
         "state_size": 4, "n_groups": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        {"intermediate_size": 64},
    ),
    "gemma3_text": (
        {**SIZES, "head_dim": 8, "num_hidden_layers": 4, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"sliding_window_pattern": 2},
    ),
    "deepseek_v3": (
        {**SIZES, **LATENT, "num_key_value_heads": 4, "q_lora_rank": None, "n_routed_experts": 4,
         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    ),
    "minimax": (
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "num_hidden_layers": 2, "layer_types": TWO, "linear_attn_alpha_factor": 2.0},
        {"architectures": ["MiniMaxText01ForCausalLM"], "attn_type_list": [0, 1],
         "layernorm_linear_attention_alpha": 2.0, "layernorm_mlp_beta": 1.0, "postnorm": True,
         "shared_intermediate_size": 0, "rotary_dim": 8},
    ),
    "gpt_oss": (
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "num_hidden_layers": 2, "sliding_window": 8},
        {"experts_per_token": 2},
    ),
}  # fmt: skip


def saved(name, arguments, folder, **changes):
    """A model of theirs with random weights, and ours."""
    torch.manual_seed(0)
    family = FAMILIES[name.split("-")[0]]
    config = family.their_config({**arguments, **changes})
    getattr(transformers, family.architecture)(config).save_pretrained(folder)
    return family, hybrid.HybridForCausalLM.from_published(folder)


@pytest.mark.parametrize("case", WORDS)
def test_words_that_servers_want(case, tmp_path):
    arguments, expected = WORDS[case]
    family, ours = saved(case, arguments, tmp_path / "theirs")
    export(ours, tmp_path / "out", family.name)
    values = read_json(tmp_path / "out" / "config.json")
    assert {key: values.get(key, "missing") for key in expected} == expected
    again = hybrid.HybridForCausalLM.from_published(tmp_path / "out")
    assert differences(family, again, ours) == []
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    ("name", "extra", "kind"),
    [
        ("qwen3_5_text", {}, "qwen3_5"),
        (
            "qwen3_5_moe_text",
            {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
            "qwen3_5_moe",
        ),
    ],
)
def test_qwen3_5_is_wrapped(name, extra, kind, tmp_path):
    sizes = {**SIZES, **DELTA, "num_hidden_layers": 4, "head_dim": 8, "tie_word_embeddings": True}
    family, ours = saved(name, {**sizes, **extra}, tmp_path / "theirs")
    export(ours, tmp_path / "out", name)
    values = read_json(tmp_path / "out" / "config.json")
    assert values["model_type"] == kind
    assert values["text_config"]["model_type"] == name
    assert values["text_config"]["full_attention_interval"] == 4
    assert values["tie_word_embeddings"] is values["text_config"]["tie_word_embeddings"] is True
    if extra:
        with Checkpoint(tmp_path / "out") as found:
            spec = found.specs["model.layers.0.mlp.experts.gate_up_proj"]
            assert spec.shape == (4, 16, 32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == family.architecture
    back = hybrid.HybridForCausalLM.from_published(again).state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.state_dict().items())


def test_names_of_tensors_as_published(tmp_path):
    arguments, _ = WORDS["kimi_linear"]
    _, ours = saved("kimi_linear", arguments, tmp_path / "kimi")
    export(ours, tmp_path / "kimi_out", "kimi_linear")
    names = load_file(tmp_path / "kimi_out" / "model.safetensors").keys()
    feeds = {name.split(".")[3] for name in names if name.startswith("model.layers.1.")}
    assert "mlp" in feeds
    assert "block_sparse_moe" not in feeds
    assert "model.layers.2.block_sparse_moe.experts.0.w1.weight" in names
    assert "model.layers.2.block_sparse_moe.shared_experts.gate_proj.weight" in names

    sizes = {**SIZES, **DELTA, "num_hidden_layers": 2, "layer_types": TWO}
    _, ours = saved("olmo_hybrid", sizes, tmp_path / "olmo")
    export(ours, tmp_path / "olmo_out", "olmo_hybrid")
    names = load_file(tmp_path / "olmo_out" / "model.safetensors").keys()
    norms = [sorted(n.split(".")[3] for n in names if f"layers.{i}." in n and "layernorm." in n)
             for i in range(2)]  # fmt: skip
    assert norms == [
        ["input_layernorm", "post_attention_layernorm"],
        ["post_attention_layernorm", "post_feedforward_layernorm"],
    ]

    arguments, _ = WORDS["bailing_hybrid"]
    _, ours = saved("bailing_hybrid", arguments, tmp_path / "ling")
    export(ours, tmp_path / "ling_out", "bailing_hybrid")
    names = load_file(tmp_path / "ling_out" / "model.safetensors").keys()
    outputs = sorted(name for name in names if "attention.dense." in name or ".o_proj." in name)
    assert outputs == [
        "model.layers.0.attention.o_proj.weight",
        "model.layers.1.attention.o_proj.weight",
        "model.layers.2.attention.dense.weight",
    ]


# case -> family, arguments to change, and the warning
WARNED = {
    "irregular": ("qwen3_next", {"layer_types": [TWO[1], TWO[0], TWO[0], TWO[1]]},
                  "layer_types: a softmax layer does not end every group"),
    # of a size whose root bfloat16 holds
    "irregular window": ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3,
                                         "hidden_size": 64, "query_pre_attn_scalar": 8},
                         "layer_types: a softmax layer does not end every group"),
    "clamped": ("granitemoehybrid-dense", {"time_step_limit": (0.01, 0.5)},
                r"time_step_limit: time steps are clamped to \[0.01, 0.5\]; vLLM, mlx-lm"),
    "clamped from below": ("mamba2", {"time_step_limit": (0.01, float("inf"))},
                           r"time_step_limit: time steps are clamped to \[0.01, inf\]"),
    "nemotron": ("nemotron_h", {"time_step_min": 0.01}, "time_step_min: time steps are at least 0.01"),
    "untied": ("lfm2", {"tie_word_embeddings": False}, "tie_word_embeddings: False; vLLM"),
    "renormalised": ("jamba", {}, "mlx-lm renormalises the weights of the chosen experts"),
    "scattered": ("kimi_linear", {"mlp_layer_types": ["dense", "sparse", "dense"]},
                  "mlp_layer_types: dense feed-forwards after the first experts"),
    "unquantized": ("gpt_oss", {}, "mlx-lm reads gpt-oss in MXFP4 only"),
    "minimax": ("minimax", {}, "mlx-lm's minimax is MiniMax-M2"),
}  # fmt: skip
SILENT = {
    "periodic": ("qwen3_next", {}),
    "not clamped": ("granitemoehybrid-dense", {}),
    "nemotron": ("nemotron_h", {"time_step_min": published.NO_CLAMP}),
    "tied": ("lfm2", {"tie_word_embeddings": True}),
    "dense": ("jamba-dense", {}),
    "dense first": ("kimi_linear", {}),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_servers_cannot_do_is_warned_of(case, tmp_path, caplog):
    name, changes, message = WARNED[case]
    family, ours = saved(name, WORDS[name][0], tmp_path / "theirs", **changes)
    with caplog.at_level(logging.WARNING, "hybrid"):
        export(ours, tmp_path / "out", family.name)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{family.name}: ")
    assert re.search(message, record.getMessage())


@pytest.mark.parametrize("case", SILENT)
def test_what_servers_can_do_is_not(case, tmp_path, caplog):
    name, changes = SILENT[case]
    family, ours = saved(name, WORDS[name][0], tmp_path / "theirs", **changes)
    with caplog.at_level(logging.WARNING, "hybrid"):
        export(ours, tmp_path / "out", family.name)
    assert caplog.records == []


@pytest.mark.parametrize(("window", "warned"), [(8, True), (64, False), (None, False)])
def test_windows(window, warned, tmp_path, caplog):
    sizes = {**SIZES, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": window}
    _, ours = saved("mistral", sizes, tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, "hybrid"):
        export(ours, tmp_path / "out", "mistral")
    lines = [record.getMessage() for record in caplog.records]
    said = "mistral: sliding_window: 8; mlx-lm and llama.cpp attend to all tokens"
    assert lines == ([said] if warned else [])


GRIFFIN = {
    "hidden_size": 256, "lru_width": None, "conv1d_width": 4, "num_key_value_heads": 1,
    "attention_bias": False, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1d_width": 3}, "conv1d_width: 3; mlx-lm takes 4"),
        ({"lru_width": 320}, "lru_width: 320; mlx-lm takes 256"),
        ({"attention_bias": True}, "attention_bias: True; mlx-lm takes False"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps: 1e-06; mlx-lm takes 1e-05"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor: 1.0; mlx-lm"),
        ({"hidden_size": 2560, "lru_width": 2560}, "embedding scale: 50.5; mlx-lm takes 50.59"),
    ],
)  # fmt: skip
def test_what_mlx_lm_does_not_read_of_recurrent_gemma(changes, message):
    servers, *lines = published.griffin({**GRIFFIN, **changes})
    assert servers == "vLLM, SGLang and llama.cpp do not have RecurrentGemma; mlx-lm does"
    (line,) = lines
    assert line.startswith(message)


def test_recurrent_gemma_as_mlx_lm_has_it():
    assert len(published.griffin(GRIFFIN)) == 1


@pytest.mark.parametrize(
    ("limit", "values", "message"),
    [
        ("multiplied", {"key_multiplier": 0.5, "attention_in_multiplier": 1.0}, "key_multiplier: 0.5"),
        ("multiplied", {"key_multiplier": 1.0, "attention_in_multiplier": 1.0}, None),
        ("rounded_scale", {"hidden_size": 24}, "embedding scale: 4.89"),
        ("rounded_scale", {"hidden_size": 256}, None),
        (
            "own_query_scale",
            {"query_pre_attn_scalar": 7, "head_dim": 10},
            "query_pre_attn_scalar: 7; llama.cpp takes head_dim, 10",
        ),
        ("own_query_scale", {"query_pre_attn_scalar": 256, "head_dim": 256}, None),
        (
            "one_epsilon",
            {"mixer_rms_eps": 1e-6, "layer_norm_epsilon": 1e-5},
            "mixer_rms_eps: 1e-06; llama.cpp takes layer_norm_epsilon, 1e-05",
        ),
        ("one_epsilon", {"mixer_rms_eps": 1e-5, "layer_norm_epsilon": 1e-5}, None),
        ("own_factor", {"rope_parameters": {"full_attention": {"attention_factor": 1.2}}},
         "attention_factor: 1.2; mlx-lm computes it"),
        ("own_factor", {"rope_parameters": {"rope_theta": 1e4}}, None),
    ],
)  # fmt: skip
def test_what_servers_compute_otherwise(limit, values, message):
    lines = getattr(published, limit)(values)
    assert len(lines) == (message is not None)
    assert not lines or lines[0].startswith(message)


def test_the_byte_tokenizer(tmp_path, caplog):
    mixers = {"S": {"num_heads": 4}}
    config = hybrid.HybridConfig(layout="S", hidden_size=32, vocab_size=259, mixers=mixers)
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "ours")
    byte_tokenizer().save_pretrained(tmp_path / "ours")
    with caplog.at_level(logging.WARNING, "hybrid"):
        export(tmp_path / "ours", tmp_path / "out", "llama")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "llama: tokenizer: bytes; llama.cpp does not know it, and needs a published one"
    ]


def test_aliases_are_written_once():
    assert published.alias_words({"a": 1, "b": 2}, {"x": "a", "b": "a", "y": "z"}) == {"x": 1}
