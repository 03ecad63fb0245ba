"""LFM2-MoE."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip

CASES = {
    "published": {**SIZES, "num_hidden_layers": 3, "num_dense_layers": 1,
                  "layer_types": ["conv", "full_attention", "conv"]},
    "switches": {**SIZES, "num_hidden_layers": 2, "num_dense_layers": 0, "conv_bias": True,
                 "layer_types": ["full_attention", "conv"], "use_expert_bias": False,
                 "norm_topk_prob": False, "routed_scaling_factor": 1.7},
}  # fmt: skip
RESPELT = {"intermediate_size"}
