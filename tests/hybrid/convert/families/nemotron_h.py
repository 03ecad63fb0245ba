"""Nemotron-H with plain feed-forwards, and Nemotron 3 with experts behind a latent projection."""

SIZES = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 10, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 14, "routed_scaling_factor": 2.5,
}  # fmt: skip

CASES = {
    "nemotron_h": {**SIZES, "hybrid_override_pattern": "M-M*-", "time_step_min": 0.3,
                   "time_step_max": 0.6},
    "biases": {**SIZES, "hybrid_override_pattern": "M*-", "use_bias": True, "mlp_bias": True,
               "use_conv_bias": False, "tie_word_embeddings": False, "conv_kernel": 3},
    "nemotron_3": {**SIZES, **EXPERTS, "hybrid_override_pattern": "MEM*E"},
    "latent": {**SIZES, **EXPERTS, "hybrid_override_pattern": "E*MME", "moe_latent_size": 16,
               "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
}  # fmt: skip
RESPELT = {
    "intermediate_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "routed_scaling_factor",
}  # fmt: skip
