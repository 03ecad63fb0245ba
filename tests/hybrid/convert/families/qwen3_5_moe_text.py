"""Qwen3.5, mixture of experts."""

CASES = {
    "published": {
        "hidden_size": 24, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 5,
        "linear_value_head_dim": 7, "num_hidden_layers": 4, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10,
    },
}  # fmt: skip
