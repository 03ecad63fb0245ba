"""`hybrid.plan`: counted against built models, and against published figures."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybrid import HybridConfig
from hybrid.plan import human_bytes, load_model_config, parse_tokens, plan

LLAMA_3_8B = {
    "layout": "S",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "feed_forwards": {"-": {"intermediate_size": 14336}},
}


def test_parameters_of_llama_3_8b_are_the_published_count():
    config = HybridConfig(**LLAMA_3_8B, mixers={"S": {"num_heads": 32, "num_kv_heads": 8}})
    assert plan(config).parameters == 8_030_261_248


def test_kv_cache_of_published_shapes():
    """32 layers of 32 heads of 128 at 8192 tokens in 2 bytes: 4 GiB; 80 layers of 64 heads: 20."""
    mha = HybridConfig(**LLAMA_3_8B, mixers={"S": {"num_heads": 32}})
    assert plan(mha, 8192).cache_bytes == 4 * 2**30
    large = {**LLAMA_3_8B, "num_hidden_layers": 80, "hidden_size": 8192}
    assert plan(HybridConfig(**large, mixers={"S": {"num_heads": 64}}), 8192).cache_bytes == (
        20 * 2**30
    )


def test_a_linear_stack_has_a_cache_of_one_size():
    costs = [plan(HybridConfig(layout="L4"), n) for n in (1, 10_000)]
    assert costs[0].cache_bytes == costs[1].cache_bytes > 0
    assert costs[0].flops_per_token == costs[1].flops_per_token


@pytest.mark.parametrize("layout", ["S2", "[LS]2", "L-S-"])
def test_counted_parameters_are_the_models(build, layout):
    model = build(layout=layout)
    assert plan(model.config).parameters == model.num_parameters()


@pytest.mark.parametrize("combine", ["sum", "concat", "learned", "learned_scalar"])
def test_what_joins_mixers_side_by_side_is_counted(build, combine):
    """A projection from 2 D to D, a norm of D or a number for each of two branches."""
    summed, joined = (build(layout="[LS]2", parallel_combine=c) for c in ("sum", combine))
    d = summed.config.hidden_size
    parameters = {"sum": 0, "concat": 2 * d * d, "learned": 2 * d, "learned_scalar": 2}[combine]
    costs = [plan(model.config) for model in (summed, joined)]
    assert costs[1].parameters == joined.num_parameters()
    assert costs[1].parameters - costs[0].parameters == 2 * parameters
    flops = 2 * 2 * parameters if combine == "concat" else 0
    assert costs[1].flops_per_token - costs[0].flops_per_token == flops


def test_matmul_flops_against_torchs_counter(build, ids):
    """Projections and logits; the attention of torch's counter is the whole square."""
    model = build(layout="S2", dtype=torch.float32)
    time = 12
    with FlopCounterMode(display=False) as counter:
        model(ids(1, time))
    counts = counter.get_flop_counts()["Global"]
    projections = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    cost = plan(model.config, time)
    mixing = sum(layer.mixer.mixing_flops(time) for layer in model.model.layers)
    assert (cost.flops_per_token - mixing) * time == projections


def test_untied_head_counts_as_embedding():
    tied, untied = (HybridConfig(tie_word_embeddings=t) for t in (True, False))
    assert plan(untied).embedding_parameters == 2 * plan(tied).embedding_parameters


def test_a_context_beyond_the_positions_is_refused():
    config = HybridConfig(max_position_embeddings=128)
    with pytest.raises(ValueError, match="from 1 to max_position_embeddings 128"):
        plan(config, 129)
    with pytest.raises(ValueError, match="context"):
        plan(config, 0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_published_config_of_a_quantized_model_of_images(wrapped, tmp_path):
    """What stands around the text model, and how its weights are stored, change nothing."""
    text = {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "hidden_size": 64}
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True}
    values = outer if wrapped else text | {"tie_word_embeddings": True}
    values["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_model_config(str(tmp_path))
    assert (config.layout, config.hidden_size, config.tie_word_embeddings) == ("D3S", 64, True)


def test_a_config_without_a_family(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json: no model_type, so the family is unknown"):
        load_model_config(str(tmp_path / "config.json"))


def test_words():
    assert (parse_tokens("8k"), parse_tokens("1m"), parse_tokens("77")) == (8192, 1048576, 77)
    assert human_bytes(4 * 2**30) == "4 GiB"
    with pytest.raises(ValueError, match="no number of tokens"):
        parse_tokens("8kk")
