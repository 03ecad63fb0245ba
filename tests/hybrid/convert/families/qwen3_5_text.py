"""Qwen3.5, dense."""

SIZES = {
    "hidden_size": 24, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 5,
    "linear_value_head_dim": 7, "num_hidden_layers": 4, "rope_theta": 1000.0,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "intermediate_size": 28},
    "switches": {**SIZES, "intermediate_size": 28, "attention_bias": True, "tie_word_embeddings": True,
                 "layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2},
}  # fmt: skip
