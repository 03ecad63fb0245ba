"""Granite-4.0-H: experts without positions, and dense with."""

SIZES = {
    "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "mamba_n_heads": 6,
    "mamba_d_head": 8, "mamba_d_state": 5, "mamba_n_groups": 2, "embedding_multiplier": 12,
    "logits_scaling": 8, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
    "shared_intermediate_size": 14, "num_hidden_layers": 4, "pad_token_id": 0,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip

CASES = {
    "experts": {**SIZES, "mamba_n_groups": 1, "num_local_experts": 5, "num_experts_per_tok": 2,
                "intermediate_size": 12, "tie_word_embeddings": True},
    "dense": {**SIZES, "num_local_experts": 0, "position_embedding_type": "rope",
              "attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False,
              "time_step_limit": (0.05, 0.9)},
}  # fmt: skip
NEEDS = {
    "dense": "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridRMSNormGated.group_size"
}
# None is "nope" in published files
RESPELT = {"num_experts_per_tok", "intermediate_size", "position_embedding_type"}
