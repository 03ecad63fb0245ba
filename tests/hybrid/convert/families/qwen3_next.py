"""Qwen3-Next: experts with a shared one, and some dense layers."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "head_dim": 16, "num_attention_heads": 3,
    "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 5, "linear_value_head_dim": 7, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 4, "norm_topk_prob": True},
    "switches": {**SIZES, "num_hidden_layers": 3, "attention_bias": True, "norm_topk_prob": False,
                 "layer_types": ["full_attention", "linear_attention", "linear_attention"],
                 "mlp_only_layers": [1], "tie_word_embeddings": True, "linear_conv_kernel_dim": 3,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                                     "partial_rotary_factor": 0.5}},
}  # fmt: skip
RESPELT = {"decoder_sparse_step", "mlp_only_layers", "intermediate_size"}
