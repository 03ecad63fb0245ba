import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3NextConfig

from hybrid_eval.cost import cache_tensors, evaluate_cost, measure_cache, prefill, tensor_bytes

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_keys_and_values_grow_by_what_the_formula_says():
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3, **SMALL))
    cost = measure_cache(model)
    # 2 (keys, values) x layers x kv heads x head dim x 4 bytes
    assert (cost.fixed, cost.per_token) == (0, 2 * 3 * 2 * 8 * 4)
    assert cost.at(1000) == 1000 * cost.per_token


def test_half_precision_costs_half():
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=3, **SMALL))
    full = measure_cache(model).per_token
    assert measure_cache(model.to(torch.bfloat16)).per_token * 2 == full


@pytest.mark.parametrize("window", [24, 300])
def test_a_sliding_window_stops_growing(window):
    model = AutoModelForCausalLM.from_config(
        MistralConfig(num_hidden_layers=2, sliding_window=window, **SMALL)
    )
    cost = measure_cache(model)
    direct = tensor_bytes(prefill(model, 400))
    assert cost.at(400) == cost.at(100_000) == direct
    assert cost.per_token == 0


def test_a_hybrid_has_a_fixed_part_and_a_growing_part():
    model = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            **SMALL,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=16,
            linear_conv_kernel_dim=4,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )
    cost = measure_cache(model)
    state = 4 * 8 * 16 * 4
    assert cost.fixed >= state
    assert cost.layers[0].per_token == 0
    assert cost.layers[1].fixed == 0
    assert cost.at(200) == tensor_bytes(prefill(model, 200))


def test_a_tensor_that_is_held_twice_counts_once():
    tensor = torch.zeros(4)
    assert len(list(cache_tensors([tensor, {"again": tensor}]))) == 1


def test_parameters_count_tied_embeddings_once():
    tied = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **SMALL)
    free = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **SMALL)
    counts = [
        evaluate_cost(AutoModelForCausalLM.from_config(config))["parameters"]
        for config in (tied, free)
    ]
    assert counts[0]["embedding"] == 128 * 32
    assert counts[1]["embedding"] == 2 * 128 * 32
    assert counts[0]["non_embedding"] == counts[1]["non_embedding"]


def test_a_model_without_a_cache_is_named(recall_model):
    recall_model.forward = lambda input_ids, use_cache, logits_to_keep=0: object()
    with pytest.raises(ValueError, match="RuleModel: expected cache, "):
        measure_cache(recall_model)
